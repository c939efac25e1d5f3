// How one example looks: as a card, a line, or enlarged.

// Pictures and sounds that a section shows are taken from there.
const shownMedia = once(() => {
  const found = new Map();
  for (const element of document.querySelectorAll("img[data-key], audio[data-key]"))
    if (!found.has(element.dataset.key + element.tagName)) found.set(element.dataset.key + element.tagName, element.getAttribute("src"));
  return found;
});

function exampleOf(split, index) {
  const key = `${split}-${index}`;
  const entry = DATA.examples[key];
  if (!entry) return null;
  if (entry.image === "") entry.image = shownMedia().get(`${key}IMG`);
  if (entry.sound === "") entry.sound = shownMedia().get(`${key}AUDIO`);
  return entry;
}

const nameOf = (split, index) => (split === "train" ? `training example ${index}` : `query ${index}`);

function captionOf(split, index, row) {
  const entry = exampleOf(split, index);
  return (entry && entry.caption) || labelOf(split, split === "train" ? index : row) || "";
}

function picture(split, index, largest) {
  const entry = exampleOf(split, index);
  if (!entry || !entry.image) return null;
  const [width, height] = entry.shape;
  const scale = largest / Math.max(width, height);
  return h("img", {
    src: largest > 112 && entry.enlarged ? entry.enlarged : entry.image,
    width: Math.round(width * scale), height: Math.round(height * scale),
    alt: entry.caption || nameOf(split, index),
    class: largest > 112 && entry.enlarged ? "smooth" : null,
  });
}

function player(split, index) {
  const entry = exampleOf(split, index);
  if (!entry || !entry.sound) return null;
  return h("audio", { controls: true, preload: "none", src: entry.sound, "aria-label": entry.caption || nameOf(split, index) });
}

// The pieces of a text, shaded by the scores of their terms.
function shaded(pieces, terms) {
  const sizes = pieces.map(([, place]) => (place === null || place >= terms.length ? 0 : terms[place]));
  const strongest = Math.max(...sizes.map(Math.abs), 0);
  return pieces.map(([text, place], number_) => {
    const value = sizes[number_];
    if (!value) return text;
    return h("span", {
      class: `token ${kindOf(value)}`, title: number(value, true, strongest),
      style: { "--share": `${(100 * Math.abs(value)) / strongest}%` },
    }, text);
  });
}

function textOf(entry, letters, terms) {
  if (!entry || entry.text === undefined) return null;
  const cut = entry.text.length > letters;
  const shown = terms && entry.pieces ? shaded(entry.pieces, terms) : cut ? `${entry.text.slice(0, letters).trimEnd()}…` : entry.text;
  return h("p", { class: "text data", dir: "auto" }, shown);
}

function cellsOf(entry, most) {
  if (!entry || !entry.row) return null;
  const cells = Object.entries(entry.row);
  return h("dl", { class: "cells" },
    cells.slice(0, most).map(([name, value]) => h("div", {}, h("dt", { class: "data" }, name), h("dd", { class: "data" }, value))),
    cells.length > most ? h("div", { class: "faint" }, `and ${cells.length - most} more`) : null);
}

function sparkline(parts, tallest) {
  const width = 64, height = 24, slot = width / parts.length, middle = height / 2;
  return svg("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
    "aria-label": `by segment: ${parts.map((part) => number(part, true)).join(", ")}` },
    parts.map((part, place) => {
      const size = tallest ? (Math.min(Math.abs(part), tallest) / tallest) * middle : 0;
      return svg("rect", { class: kindOf(part), x: place * slot, width: 0.8 * slot, y: part >= 0 ? middle - size : middle, height: Math.max(size, 0.5) });
    }),
    svg("line", { class: "axis", x1: 0, x2: width, y1: middle, y2: middle }));
}

const MARK_KEYS = { wrong: "x", keep: "o", relabel: "r" };

function markButtons(index, withNote) {
  if (DATA.edits) return null;
  const entry = marks.get(index) || { mark: "", label: "", note: "" };
  const buttons = Object.keys(MARKS).map((mark) =>
    button(mark, (event) => { event.stopPropagation(); toggleMark(index, mark); },
      { class: `mark ${mark}`, "aria-pressed": entry.mark === mark, title: `mark as ${mark} (${MARK_KEYS[mark]})` }));
  const parts = [h("span", { class: "mark-buttons", role: "group", "aria-label": `mark ${nameOf("train", index)}` }, buttons)];
  if (entry.mark === "relabel") {
    const change = (label) => setMark(index, { mark: "relabel", label });
    parts.push(labelColumn && labelColumn.groups.length
      ? select("new label", [["", "new label…"], ...labelColumn.groups.map((group) => [group, group])], entry.label, change)
      : h("input", { type: "text", "aria-label": "new label", placeholder: "new label", value: entry.label, on: { change: (event) => change(event.target.value) } }));
  }
  if (withNote || entry.note)
    parts.push(h("input", { type: "text", class: "note", "aria-label": `note on ${nameOf("train", index)}`, placeholder: "note (n)", value: entry.note,
      on: { change: (event) => setMark(index, { note: event.target.value }), click: (event) => event.stopPropagation() } }));
  return h("span", { class: "marking", "data-marks": index }, parts);
}

function link(index) {
  return h("a", { class: "self", href: `#train-${index}`, title: "enlarge" }, `#${index}`);
}

// A training example in a list; `said` are elements beside it.
function card(index, said, terms) {
  const entry = exampleOf("train", index);
  const mark = (marks.get(index) || {}).mark || "";
  const caption = captionOf("train", index);
  const wide = entry && (entry.text !== undefined || entry.row);
  return h("li", { class: `item${wide ? " wide" : ""}`, tabindex: "0", "data-train": index, "data-mark": mark },
    h("div", { class: "look" },
      picture("train", index, 64), player("train", index),
      textOf(entry, 320, terms), cellsOf(entry, 14),
      h("p", { class: "caption" }, caption ? h("span", { class: "data" }, caption) : null, " ", link(index))),
    h("div", { class: "said" }, said, markButtons(index)));
}

const dialog = h("dialog", { class: "enlarged", "aria-label": "example", on: {
  close: () => { if (/^#train-\d+$/.test(location.hash)) history.replaceState(null, "", `#${before.hash}`); },
  click: (event) => { if (event.target === dialog) dialog.close(); },
} });
const before = { hash: "queries" };

function fact(name, value) {
  return value === null || value === undefined ? null : h("div", {}, h("dt", {}, name), h("dd", {}, value));
}

function enlarge(index) {
  const entry = exampleOf("train", index);
  const place = placeOf(index);
  const known = place !== undefined;
  const suggested = suggestedLabel(index);
  dialog.dataset.train = index;
  fill(dialog,
    h("header", {}, h("h2", {}, `Training example ${index}`), button("close", () => dialog.close(), { "aria-label": "close (Esc)" })),
    picture("train", index, entry && entry.enlarged ? 256 : 224), player("train", index),
    textOf(entry, Infinity), cellsOf(entry, Infinity),
    entry ? null : h("p", { class: "faint" }, "This example's content is not included, to keep the file small: only its numbers are."),
    h("p", { class: "caption data" }, captionOf("train", index)),
    h("dl", { class: "facts-of" },
      columns.map((column) => (known ? fact(column.name, h("span", { class: "data" }, column.groups[column.train[place]])) : null)),
      suggested ? fact("suggested label", h("span", { class: "data" }, suggested)) : null,
      known && train.selfInfluence ? fact("self-influence", number(train.selfInfluence[place])) : null,
      known ? fact("queries harmed", count(train.harmed[place])) : null,
      known ? fact("sum over queries", number(train.net[place], true)) : null),
    markButtons(index, true));
  if (!dialog.open) dialog.showModal();
}
