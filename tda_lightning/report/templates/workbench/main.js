// The tabs, the keyboard, and what an address asks for.

const TABS = [
  ["queries", "Queries", queriesTab, () => showQueryList(false)],
  ["triage", "Training examples", triageTab, () => { filterTriage(); showTriage(false); showMarkCount(); }],
  ["groups", "Groups", groupsTab, showGroups],
];
if (DATA.others.length || DATA.members) TABS.push(["compare", "Agreement", compareTab, () => {}]);
TABS.push(["about", "How to read this", null, () => {}]);

const made = new Set();
let currentTab = "";

function openTab(name) {
  const [, , make, show] = TABS.find(([each]) => each === name);
  const panel = document.getElementById(`tab-${name}`);
  if (!made.has(name)) {
    made.add(name);
    if (make) { panel.append(make()); show(); }
  }
  for (const [each] of TABS) {
    document.getElementById(`tab-${each}`).hidden = each !== name;
    const tab = document.getElementById(`to-${each}`);
    if (each === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  document.body.classList.toggle("show-about", name === "about");
  currentTab = name;
}

// #queries, #query-5, #query-5-train-12, #triage, #train-12, #groups, #compare, #about
function follow() {
  const hash = location.hash.slice(1);
  const [, row, example] = /^query-(\d+)(?:-train-(\d+))?$/.exec(hash) || [];
  const [, index] = /^(?:train|suspect-train)-(\d+)$/.exec(hash) || [];
  if (index !== undefined || example !== undefined) {
    if (!currentTab) { openTab(example === undefined ? "triage" : "queries"); if (example !== undefined && Number(row) < DATA.numQueries) showQuery(Number(row)); }
    if (Number(index ?? example) < DATA.numTrain) enlarge(Number(index ?? example));
    return;
  }
  if (dialog.open) dialog.close();
  before.hash = hash || "queries";
  if (row !== undefined && Number(row) < DATA.numQueries) {
    openTab("queries");
    if (queryState.selected !== Number(row)) showQuery(Number(row));
    return;
  }
  const section = document.getElementById(hash);
  if (section && section.classList.contains("about")) { openTab("about"); section.scrollIntoView(); return; }
  openTab(TABS.some(([name]) => name === hash) ? hash : "queries");
  if (currentTab === "queries" && queryState.selected === null && queryState.order.length) showQuery(queryState.order[0]);
}

const KEYS = [
  ["/", "search"], ["j, k", "next, previous query or training example"], ["Enter", "enlarge the training example"],
  ["x, o, r", "mark it as wrong, keep, relabel (once more: unmark)"], ["n", "a note on it"], ["m", "more of the list"],
  ["1 … 5", "the tabs"], ["Esc", "close"], ["?", "this list"],
];

function showKeys() {
  dialog.dataset.train = "";
  fill(dialog, h("header", {}, h("h2", {}, "Keys"), button("close", () => dialog.close())),
    h("dl", { class: "keys" }, KEYS.map(([key, text]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)))));
  if (!dialog.open) dialog.showModal();
}

function focusedExample() {
  if (dialog.open && dialog.dataset.train) return dialog;
  return document.activeElement ? document.activeElement.closest("[data-train]") : null;
}

function nextExample(step) {
  const items = [...document.querySelectorAll(`#tab-${currentTab} li[data-train]`)];
  const focused = document.activeElement.closest("li[data-train]");
  if (!items.length) return;
  const next = items[focused ? Math.min(Math.max(items.indexOf(focused) + step, 0), items.length - 1) : 0];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (typing) {
    if (event.key === "Escape" && event.target.type === "search") event.target.blur();
    return;
  }
  const item = focusedExample();
  const index = item ? Number(item.dataset.train) : null;
  const mark = Object.entries(MARK_KEYS).find(([, key]) => key === event.key);
  if (mark && index !== null && !DATA.edits) toggleMark(index, mark[0]);
  else if (event.key === "n" && index !== null && !DATA.edits) {
    if (item.tagName === "LI") location.hash = `train-${index}`;
    requestAnimationFrame(() => { const note = dialog.querySelector(".note"); if (note) note.focus(); });
  } else if (event.key === "Enter" && item && event.target === item) location.hash = `train-${index}`;
  else if (dialog.open) return;
  else if (event.key === "/") { const box = document.querySelector(`#tab-${currentTab} input[type=search]`); if (box) { box.focus(); box.select(); } }
  else if (event.key === "j" || event.key === "k") {
    const step = event.key === "j" ? 1 : -1;
    if (currentTab === "queries" && !item) nextQuery(step);
    else nextExample(step);
  } else if (event.key === "m") { const more = [...document.querySelectorAll(`#tab-${currentTab} .more`)].find((each) => !each.hidden); if (more) more.click(); }
  else if (event.key === "?") showKeys();
  else if (/^[1-9]$/.test(event.key) && TABS[Number(event.key) - 1]) location.hash = TABS[Number(event.key) - 1][0];
  else return;
  event.preventDefault();
}

const left = [];
if (DATA.leftOut) left.push("Pictures, sounds and texts of the less important examples are left out, to keep the page small.");
if (DATA.listed.length < DATA.numQueries) left.push(`The page has the strongest training examples of ${count(DATA.listed.length)} of ${plural(DATA.numQueries, "query", "queries")}, the wrong and worst ones.`);
if (DATA.train.index) left.push(`It has numbers of the ${count(train.index.length)} most suspicious of ${plural(DATA.numTrain, "training example")}.`);
const keptExamples = Object.keys(DATA.examples).length;
if (keptExamples < DATA.numTrain + DATA.numQueries && keptExamples) left.push(`To keep this file small, it includes the content of only ${plural(keptExamples, "example")}, those you are most likely to open; for the rest it has numbers and groups.`);

document.body.classList.add("with-script");
fill(document.getElementById("workbench"),
  h("nav", { class: "tabs", "aria-label": "Views" },
    TABS.map(([name, text], place) => h("a", { id: `to-${name}`, href: `#${name}`, title: `key ${place + 1}` }, text)),
    button("?", showKeys, { class: "help", "aria-label": "keys" })),
  left.length ? h("p", { class: "left-out" }, left.join(" ")) : null,
  TABS.map(([name, text]) => h("div", { id: `tab-${name}`, class: "tab", role: "region", "aria-label": text, hidden: true })),
  h("p", { id: "announced", role: "status", "aria-live": "polite" }), dialog);
document.getElementById("workbench").hidden = false;
addEventListener("hashchange", follow);
addEventListener("keydown", press);
follow();
