// What the reader thinks of training examples: kept in the browser, exported, imported.

const STORED = `tda-lightning marks ${DATA.id}`;
const marks = new Map(); // index -> { mark, label, note }
const MARKS = { wrong: "wrong", keep: "keep", relabel: "relabel" };
const changed = [];

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED) || "[]");
  } catch {
    return []; // some browsers keep nothing for files
  }
}

function remember() {
  try {
    localStorage.setItem(STORED, JSON.stringify([...marks]));
  } catch {
    return;
  }
}

function setMark(index, change) {
  const before = marks.get(index) || { mark: "", label: "", note: "" };
  const after = { ...before, ...change };
  if (after.mark !== "relabel") after.label = "";
  if (after.mark || after.note) marks.set(index, after);
  else marks.delete(index);
  remember();
  changed.forEach((act) => act(index));
}

function toggleMark(index, mark) {
  const current = (marks.get(index) || {}).mark;
  if (current === mark) return setMark(index, { mark: "" });
  return setMark(index, { mark, label: mark === "relabel" ? suggestedLabel(index) : "" });
}

function suggestedLabel(index) {
  const place = placeOf(index);
  const suggested = train.suggested && place !== undefined ? train.suggested[place] : -1;
  return suggested >= 0 ? labelColumn.groups[suggested] : "";
}

const sorted = () => [...marks].sort(([one], [two]) => one - two);

// A spreadsheet would run a cell that begins like a formula; the apostrophe makes it text.
const cell = (text) => {
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
};

function marksAsTable() {
  const lines = sorted().map(([index, entry]) =>
    [String(index), entry.mark, cell(entry.label), cell(labelOf("train", index) || ""), cell(entry.note)].join(","));
  return ["index,mark,new_label,label,note", ...lines, ""].join("\r\n");
}

function marksAsEdits() {
  const edits = [];
  for (const [index, entry] of sorted()) {
    const note = entry.note ? { note: entry.note } : {};
    if (entry.mark === "wrong") edits.push({ kind: "Removal", index, ...note });
    if (entry.mark === "relabel" && entry.label !== "") {
      const label = Object.hasOwn(DATA.labels, entry.label) ? DATA.labels[entry.label] : entry.label;
      edits.push({ kind: "Relabel", index, label, ...note });
    }
  }
  return JSON.stringify({ format: "tda-lightning edits", version: 1, num_train: DATA.numTrain, edits }, null, 1) + "\n";
}

function download(text, name, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function readTable(text) {
  const rows = [[]];
  let field = "", quoted = false;
  for (let place = 0; place < text.length; place += 1) {
    const letter = text[place];
    if (quoted && letter === '"' && text[place + 1] === '"') { field += '"'; place += 1; }
    else if (letter === '"' && (quoted || field === "")) quoted = !quoted;
    else if (!quoted && letter === ",") { rows.at(-1).push(field); field = ""; }
    else if (!quoted && (letter === "\n" || letter === "\r")) {
      if (letter === "\r" && text[place + 1] === "\n") place += 1;
      rows.at(-1).push(field); field = ""; rows.push([]);
    } else field += letter;
  }
  rows.at(-1).push(field);
  const [header, ...body] = rows.filter((row) => row.some((entry) => entry !== ""));
  if (!header || !header.includes("index") || !header.includes("mark"))
    throw new Error("a table of marks begins with a line of column names, index and mark among them");
  return body.map((row) => Object.fromEntries(header.map((name, place) => {
    const plain = row[place] || "";
    return [name.trim(), /^'[=+\-@\t\r]/.test(plain) ? plain.slice(1) : plain];
  })));
}

function readMarks(text) {
  let found;
  if (text.trimStart().startsWith("{")) {
    const file = JSON.parse(text);
    if (file.format !== "tda-lightning edits" || !Array.isArray(file.edits))
      throw new Error('expected a file of edits, which has "format": "tda-lightning edits"');
    if (file.num_train !== undefined && file.num_train !== DATA.numTrain)
      throw new Error(`the edits are of ${file.num_train} training examples, this page is about ${DATA.numTrain}`);
    const name = (label) => {
      const known = Object.entries(DATA.labels).find(([, value]) => value === label);
      return known ? known[0] : String(label);
    };
    found = file.edits.map((edit) => ({
      index: edit.index,
      mark: { Removal: "wrong", Relabel: "relabel" }[edit.kind],
      label: edit.kind === "Relabel" ? name(edit.label) : "",
      note: edit.note === undefined ? "" : String(edit.note),
    }));
  } else {
    found = readTable(text).map((row) => ({ index: row.index === "" ? NaN : Number(row.index), mark: row.mark, label: row.new_label || "", note: row.note || "" }));
  }
  for (const { index, mark } of found) {
    if (!Number.isInteger(index) || index < 0 || index >= DATA.numTrain)
      throw new Error(`expected training examples from 0 to ${DATA.numTrain - 1}, got ${index}`);
    if (mark !== "" && !Object.hasOwn(MARKS, mark))
      throw new Error(`expected a mark that is wrong, keep or relabel, got ${mark}`);
  }
  return found;
}

async function importMarks(file) {
  try {
    const found = readMarks(await file.text());
    for (const { index, mark, label, note } of found) marks.set(index, { mark, label, note });
    remember();
    changed.forEach((act) => act(null));
    announce(`Read ${plural(found.length, "mark")} from ${file.name}.`);
  } catch (error) {
    announce(`${file.name} was not read: ${error.message}.`);
  }
}

for (const [index, entry] of stored()) marks.set(index, entry);
