"""The trained encoder as a model of sentence-transformers: `SentenceTransformer(folder)` gives the run's embeddings.

The folder `adapter/` (with --train full `encoder/`) of a run also holds the files that sentence-transformers reads:

    tokenizer.json, tokenizer_config.json    the tokenizer; it adds the special tokens that training added
    modules.json, 1_Pooling/config.json      encoder, then pooling; the embedding is not normalised
    sentence_bert_config.json                tokens per text, and how the weights of the base are stored (dtype, NF4)
    config_sentence_transformers.json        the instruction as a prompt

An adapter stays as small as it is: its base is loaded from where training found it. The structural features are no
part of this model, since they do not come from the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.files import read_json, write_json
from qwen3_finetune.backbone import load_tokenizer, nf4
from qwen3_finetune.data import Tokenize
from qwen3_finetune.spec import POOLING_NAMES, EncoderSpec
from training.device import require_model_source
from training.sealed import note_change
from training.weights import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDERS = {"lora": "adapter", "full": "encoder"}
"""Where a run keeps the weights that it trained, by --train; a frozen encoder has none."""


def write_sentence_transformer(run_folder: Path, spec: EncoderSpec, width: int) -> None:
    """Write everything but the weights, which `save_model` has written.

    An adapter on random weights gets nothing: its base is stored nowhere.

    Args:
        spec: of the encoder that was trained.
        width: D_in of the encoder.
    """
    if spec.train not in FOLDERS or (spec.train == "lora" and spec.random_weights):
        return
    folder = run_folder / FOLDERS[spec.train]
    tokenizer = load_tokenizer(spec.tokenizer_source(run_folder))
    tokenize = Tokenize.of(tokenizer, spec)
    _save_tokenizer(folder, tokenizer, tokenize, spec)

    modules = []
    for number, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"))):
        # every version of the library reads this name of the class
        name = f"sentence_transformers.models.{kind}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": name})
    write_json(folder / "modules.json", modules)

    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    for ours, _, flag in POOLING_NAMES:
        pooling[flag] = ours == spec.pooling
    write_json(folder / "1_Pooling" / "config.json", pooling)

    transformer = {"max_seq_length": spec.max_length, "do_lower_case": False, "model_args": _storage(spec)}
    write_json(folder / "sentence_bert_config.json", transformer)

    instruction = {"document": tokenize.prefix_text} if tokenize.prefix_text else {}
    prompts = {"prompts": instruction, "default_prompt_name": "document" if instruction else None}
    write_json(folder / "config_sentence_transformers.json", {**prompts, "similarity_fn_name": "cosine"})
    if spec.train == "lora":
        base = Path(require_model_source(spec.model))
        name_base(folder, str(base.resolve()) if base.is_dir() else spec.model)
        _name_adapted_layers(folder)


def name_base(adapter: Path, base: str) -> None:
    """Say in an adapter's folder where its base is: a hub id or a folder."""
    path = adapter / "adapter_config.json"
    write_json(path, {**read_json(path), "base_model_name_or_path": base})
    note_change(path)  # the adapter may be that of a finished run


def _name_adapted_layers(adapter: Path) -> None:
    """List the adapted layers by their full names.

    peft shortens them to their last parts, which also fit layers that training had removed, such as BERT's pooler.
    """
    names = set()
    for weight in read_weights(adapter / "adapter_model.safetensors"):
        names.add(weight.removeprefix("base_model.model.").rsplit(".lora_", 1)[0])
    path = adapter / "adapter_config.json"
    write_json(path, {**read_json(path), "target_modules": sorted(names)})


def _save_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tokenize: Tokenize, spec: EncoderSpec
) -> None:
    """Write the tokenizer so that it adds by itself what `tokenize` adds, and pads on the same side."""
    from tokenizers import processors

    tokenizer.padding_side = spec.padding_side
    tokenizer.model_max_length = spec.max_length
    if tokenizer.pad_token is None:
        tokenizer.pad_token_id = tokenize.pad_token
    adds_the_end = tokenizer("price")["input_ids"][-len(tokenize.after) :] == tokenize.after
    if tokenize.after and not adds_the_end:
        end = tokenizer.eos_token
        add_end = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
        backend: Any = tokenizer.backend_tokenizer
        earlier = backend.post_processor
        backend.post_processor = processors.Sequence([earlier, add_end]) if earlier else add_end
    tokenizer.save_pretrained(folder)


def _storage(spec: EncoderSpec) -> dict[str, Any]:
    """Arguments of `from_pretrained` that store the weights as training did."""
    if spec.quantization == "none":
        return {"dtype": str(spec.weights_dtype).removeprefix("torch.")}
    # norms and token embeddings are not quantised; peft's preparation for training keeps them in float32
    return {"dtype": "float32", "quantization_config": nf4(spec).to_dict()}
