"""review.html: a page on which a person marks pairs as one product or two, and exports the labels as csv.

The page works from a file, without a server, and asks nothing of the network. Keys: 1 same, 0 different, ↓ next.
"""

from __future__ import annotations

import json

import pandas as pd

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>Review pairs</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
  li { list-style: none; padding: .8rem; border: 1px solid #bbb; border-radius: .4rem; margin: .6rem 0; }
  li:focus { outline: 3px solid #1a5fb4; }
  ul { padding: 0; }
  .probability { color: #555; }
  label { margin-right: 1.5rem; }
  button { font: inherit; padding: .3rem 1rem; }
</style>
<h1>Are these one product?</h1>
<p>Mark each pair; the ones that the model was least sure of come first. <kbd>1</kbd> same, <kbd>0</kbd> different,
<kbd>↓</kbd> next. <span id="count" role="status"></span></p>
<p><button id="export" type="button">Export labels.csv</button></p>
<ul id="pairs"></ul>
<script id="data" type="application/json">PAIRS</script>
<script>
"use strict";
const pairs = JSON.parse(document.getElementById("data").textContent);
const answers = new Map();
const list = document.getElementById("pairs");

function answer(number, value) {
  answers.set(number, value);
  document.querySelector(`input[name="pair${number}"][value="${value}"]`).checked = true;
  document.getElementById("count").textContent = `${answers.size} of ${pairs.length} marked.`;
}

pairs.forEach((pair, number) => {
  const item = document.createElement("li");
  item.tabIndex = 0;
  for (const text of [pair.left, pair.right]) {
    const line = document.createElement("div");
    line.textContent = text;  // never innerHTML: the texts are strangers' words
    item.append(line);
  }
  const probability = document.createElement("div");
  probability.className = "probability";
  probability.textContent = `probability of a match: ${pair.probability.toFixed(2)}`;
  item.append(probability);
  for (const [value, word] of [["1", "same"], ["0", "different"]]) {
    const label = document.createElement("label");
    const choice = document.createElement("input");
    choice.type = "radio";
    choice.name = `pair${number}`;
    choice.value = value;
    choice.addEventListener("change", () => answer(number, value));
    label.append(choice, ` ${word}`);
    item.append(label);
  }
  item.addEventListener("keydown", (event) => {
    if (event.key === "0" || event.key === "1") answer(number, event.key);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && event.target === item) {
      event.preventDefault();
      list.children[number + step]?.focus();
    }
  });
  list.append(item);
});

function csvField(text) {
  return /[",\\n\\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

document.getElementById("export").addEventListener("click", () => {
  const lines = ["left_id,right_id,match,split"];
  for (const [number, value] of [...answers].sort((one, other) => one[0] - other[0])) {
    lines.push([pairs[number].left_id, pairs[number].right_id, value, "train"].map(csvField).join(","));
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
});
</script>
</html>
"""


def review_page(pairs: pd.DataFrame) -> str:
    """The page for pairs with left_id, right_id, left, right (their texts) and probability, in their order."""
    columns = ["left_id", "right_id", "left", "right", "probability"]
    content = json.dumps(pairs[columns].to_dict("records"))
    # "</script>" in a title would end the element that holds the data
    return _PAGE.replace("PAIRS", content.replace("<", "\\u003c"), 1)
