import pandas as pd

from studies import matching


def test_the_study_ends_with_a_table_for_any_folder(shops, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    flags = [
        "--pairs", str(shops), "--sets", "pairs", "--model", str(shops / "encoder"), "--no-tune", "--seeds", "0", "1",
        "--workspace", str(tmp_path), "--out", str(out),
    ]  # fmt: skip
    matching.main([*flags, "--no-cross-encoder"])
    table = pd.read_csv(out)
    assert table["evidence"].tolist() == 2 * ["bi-encoder", "features", "features and bi-encoder", "all"]
    assert table[["recall_at_1", "mrr", "f1"]].notna().all(axis=None)
    best = table.set_index("evidence")["f1"]
    assert best["features"].mean() > best["bi-encoder"].mean()
    printed = capsys.readouterr().out
    assert "±" in printed and "Ditto" not in printed  # which knows nothing of this set


def test_the_cross_encoder_has_a_row_of_its_own(shops, tmp_path):
    out = tmp_path / "scores.csv"
    matching.main(
        [
            "--pairs", str(shops), "--sets", "pairs", "--model", str(shops / "encoder"), "--no-tune", "--seeds", "0",
            "--workspace", str(tmp_path), "--out", str(out),
        ]
    )  # fmt: skip
    table = pd.read_csv(out).set_index("evidence")
    assert 0 < table.loc["all", "read_by_cross_encoder"] < 1
    assert pd.isna(table.loc["cross-encoder", "recall_at_1"]) and table.loc["cross-encoder", "f1"] >= 0
