// Training examples: the suspicious ones first, marked, exported and imported.

const triageState = { text: "", sort: "", groups: {}, only: "", suggested: "", shown: 0, order: [] };

const PAGE_OF_CARDS = 24;

const TRIAGE_SORTS = [
  ["selfInfluence", "self-influence"],
  ["disagreement", "label disagreement"],
  ["harmed", "number of queries harmed"],
  ["net", "sum of scores, most harmful"],
].filter(([name]) => train[name]);
TRIAGE_SORTS.push(["index", "number"]);

const triageOrders = new Map();
function triageOrder(sort) {
  if (!triageOrders.has(sort)) {
    const order = Int32Array.from({ length: train.index.length }, (_, place) => place);
    const values = train[sort];
    const sign = sort === "net" ? HELPS : sort === "index" ? 1 : -1;
    triageOrders.set(sort, order.sort((one, two) => sign * (values[one] - values[two]) || one - two));
  }
  return triageOrders.get(sort);
}

const keptTexts = once(() => {
  const found = new Map();
  for (const [key, entry] of Object.entries(DATA.examples))
    if (key.startsWith("train-"))
      found.set(Number(key.slice(6)), [entry.caption, entry.text || "", entry.row ? Object.entries(entry.row).flat().join(" ") : ""].join(" ").toLowerCase());
  return found;
});

// What a word finds: groups by their names, and single examples by number, looks or mark. Asked
// once for a word, so that a keystroke costs one pass over plain arrays.
function finds(word) {
  const groups = columns.map((column) => Uint8Array.from(column.groups, (group) => group.toLowerCase().includes(word)));
  const single = new Set();
  const asked = /^#?\d+$/.test(word) ? Number(word.replace("#", "")) : -1;
  if (asked >= 0) single.add(asked);
  if (word[0] !== "#") for (const [index, text] of keptTexts()) if (text.includes(word)) single.add(index);
  for (const [index, entry] of marks) if (`${entry.mark} ${entry.label} ${entry.note}`.toLowerCase().includes(word)) single.add(index);
  return { groups: groups.map((flags, at) => [columns[at].train, flags]).filter(([, flags]) => flags.includes(1)), single };
}

function filterTriage() {
  const found = triageState.text.toLowerCase().split(/\s+/).filter(Boolean).map(finds);
  const wanted = columns.map((column) => [column.train, triageState.groups[column.name] ?? ""]).filter(([, value]) => value !== "").map(([values, value]) => [values, Number(value)]);
  if (triageState.suggested !== "") wanted.push([train.suggested, Number(triageState.suggested)]);
  const { only } = triageState;
  const order = triageOrder(triageState.sort);
  if (!found.length && !wanted.length && !only) { triageState.order = order; return; }
  triageState.order = order.filter((place) => {
    for (const [values, value] of wanted) if (values[place] !== value) return false;
    for (const { groups, single } of found)
      if (!groups.some(([values, flags]) => flags[values[place]]) && !single.has(train.index[place])) return false;
    if (!only) return true;
    const mark = (marks.get(train.index[place]) || {}).mark || "";
    return only === "marked" ? marks.has(train.index[place]) : only === "unmarked" ? !mark : mark === only;
  });
}

function triageSaid(place) {
  const values = [];
  if (train.selfInfluence) values.push(["self-influence", number(train.selfInfluence[place])]);
  if (train.disagreement && train.suggested[place] >= 0) values.push(["disagreement", number(train.disagreement[place])], ["harms", h("b", { class: "data" }, labelColumn.groups[train.suggested[place]])]);
  values.push(["queries harmed", count(train.harmed[place])], ["sum", number(train.net[place], true)]);
  return h("dl", { class: "said-numbers" }, values.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "numeric" }, value))));
}

function showTriage(more) {
  const list = document.getElementById("triage-list");
  if (!more) { triageState.shown = 0; list.replaceChildren(); }
  const next = Array.from(triageState.order.slice(triageState.shown, triageState.shown + PAGE_OF_CARDS));
  list.append(...next.map((place) => card(train.index[place], triageSaid(place))));
  triageState.shown += next.length;
  document.getElementById("triage-count").textContent = `${count(triageState.order.length)} of ${plural(DATA.numTrain, "training example")}`;
  document.getElementById("more-triage").hidden = triageState.shown >= triageState.order.length;
}

function changeTriage(change) {
  Object.assign(triageState, change);
  filterTriage();
  showTriage(false);
}

function showMarkCount() {
  const counts = { wrong: 0, keep: 0, relabel: 0 };
  for (const { mark } of marks.values()) if (mark) counts[mark] += 1;
  const place = document.getElementById("mark-count");
  if (place) place.textContent = marks.size ? `${counts.wrong} wrong, ${counts.relabel} to relabel, ${counts.keep} to keep` : "nothing is marked yet";
}

// Every place that shows the example follows its mark.
changed.push((index) => {
  for (const item of document.querySelectorAll("[data-train]")) {
    const own = Number(item.dataset.train);
    if (index !== null && own !== index) continue;
    if (item.tagName === "LI") item.dataset.mark = (marks.get(own) || {}).mark || "";
    const marking = item.querySelector(".marking");
    if (!marking) continue;
    const focused = marking.contains(document.activeElement) ? document.activeElement.className.replace("note", "") : null;
    const fresh = markButtons(own, item.tagName === "DIALOG");
    marking.replaceWith(fresh);
    const again = focused && focused.trim() && fresh.getElementsByClassName(focused)[0];
    if (again) again.focus();
  }
  showMarkCount();
});

function triageTab() {
  triageState.sort = triageState.sort || TRIAGE_SORTS[0][0];
  const filters = columns.map((column) => select(column.name, [["", `all: ${column.name}`], ...column.groups.map((name, place) => [String(place), name])], "",
    (value) => changeTriage({ groups: { ...triageState.groups, [column.name]: value } })));
  if (train.suggested) filters.push(select("suggested label", [["", "any suggested label"], ...labelColumn.groups.map((name, place) => [String(place), `suggested: ${name}`])], "", (suggested) => changeTriage({ suggested })));
  const input = h("input", { type: "file", accept: ".json,.csv", hidden: true, id: "import-marks", on: { change: (event) => { if (event.target.files[0]) importMarks(event.target.files[0]); event.target.value = ""; } } });
  const marking = DATA.edits
    ? h("p", { class: "faint" }, "The columns of these scores are edits, not training examples, so there is nothing to mark.")
    : h("div", { class: "marks-bar" },
      h("span", { id: "mark-count", role: "status" }),
      button("export edits", () => download(marksAsEdits(), "edits.json", "application/json"), { id: "export-edits", title: "for tda attribute edits=FILE and tda train drop=FILE" }),
      button("export CSV", () => download(marksAsTable(), "marks.csv", "text/csv"), { id: "export-csv" }),
      button("import", () => input.click(), { id: "import-button" }), input,
      button("clear", () => { if (marks.size && confirm("Remove all marks?")) { marks.clear(); remember(); changed.forEach((act) => act(null)); } }));
  return h("div", { class: "triage" },
    h("p", { class: "prose" }, "Which labels are wrong? ",
      train.selfInfluence ? [h("b", {}, "Self-influence"), " is large where the other examples do not imply the label. "] : null,
      train.disagreement ? [h("b", {}, "Label disagreement"), " is the mean harm to the queries of the one other class that an example harms most; that class is suggested as its label. "] : null,
      h("b", {}, "Queries harmed"), " counts those for which it is among the strongest 1% of opponents."),
    marking,
    h("div", { class: "tools" },
      search("Search training examples (/)", (text) => changeTriage({ text })),
      select("order of training examples", TRIAGE_SORTS.map(([name, text]) => [name, `by ${text}`]), triageState.sort, (sort) => changeTriage({ sort })),
      filters,
      DATA.edits ? null : select("marks", [["", "all marks"], ["marked", "marked"], ["unmarked", "unmarked"], ["wrong", "wrong"], ["relabel", "relabel"], ["keep", "keep"]], "", (only) => changeTriage({ only }))),
    h("p", { class: "faint", id: "triage-count", role: "status" }),
    h("ol", { class: "items wide-items", id: "triage-list" }),
    button("more training examples", () => showTriage(true), { id: "more-triage", class: "more" }));
}
