// Training examples: the suspicious ones first, marked, exported and imported.

const triageState = { text: "", sort: "", groups: {}, only: "", suggested: "", shown: 0, order: [] };

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
    const sign = sort === "net" || sort === "index" ? 1 : -1;
    triageOrders.set(sort, order.sort((one, two) => sign * (values[one] - values[two]) || one - two));
  }
  return triageOrders.get(sort);
}

const texts = new Map();
function textOfTrain(index) {
  if (!texts.has(index)) {
    const entry = DATA.examples[`train-${index}`];
    texts.set(index, entry ? [entry.caption, entry.text || "", entry.row ? Object.entries(entry.row).flat().join(" ") : ""].join(" ").toLowerCase() : "");
  }
  return texts.get(index);
}

function matches(place, word) {
  const index = train.index[place];
  if (word[0] === "#") return String(index) === word.slice(1);
  if (String(index) === word || textOfTrain(index).includes(word)) return true;
  const entry = marks.get(index);
  return Boolean(entry && `${entry.mark} ${entry.label} ${entry.note}`.toLowerCase().includes(word));
}

function filterTriage() {
  const words = triageState.text.toLowerCase().split(/\s+/).filter(Boolean);
  // Which groups have a word in their names is asked once, not for every example.
  const named = words.map((word) => columns.map((column) => column.groups.map((group) => group.toLowerCase().includes(word))));
  const wanted = columns.map((column) => triageState.groups[column.name] ?? "");
  const suggested = triageState.suggested === "" ? null : Number(triageState.suggested);
  triageState.order = triageOrder(triageState.sort).filter((place) => {
    for (let number_ = 0; number_ < columns.length; number_ += 1)
      if (wanted[number_] !== "" && columns[number_].train[place] !== Number(wanted[number_])) return false;
    if (suggested !== null && train.suggested[place] !== suggested) return false;
    if (triageState.only) {
      const mark = (marks.get(train.index[place]) || {}).mark || "";
      if (triageState.only === "marked" ? !marks.has(train.index[place]) : triageState.only === "unmarked" ? mark : mark !== triageState.only) return false;
    }
    return words.every((word, number_) => columns.some((column, at) => named[number_][at][column.train[place]]) || matches(place, word));
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
  const next = Array.from(triageState.order.slice(triageState.shown, triageState.shown + 40));
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
    button("40 more", () => showTriage(true), { id: "more-triage", class: "more" }));
}
