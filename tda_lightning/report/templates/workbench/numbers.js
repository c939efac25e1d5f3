// The page's numbers: unpacked where they are used, and written as people read them.

const DATA = JSON.parse(document.getElementById("numbers").textContent);

// The sign of a score that helps: of additions it is negative.
const HELPS = DATA.words.helps;
// The quantity asked about; a measurement is smaller when the model does better.
const QUANTITY = DATA.words.quantity === "the measurement" ? "measurement" : DATA.words.quantity;
const kindOf = (value) => (HELPS * value >= 0 ? "proponent" : "opponent");

const ARRAYS = { i2: Int16Array, i4: Int32Array, f4: Float32Array };

function unpack(packed) {
  if (!packed) return null;
  const [[form, text]] = Object.entries(packed);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let place = 0; place < bytes.length; place += 1) bytes[place] = binary.charCodeAt(place);
  return new ARRAYS[form](bytes.buffer);
}

function once(make) {
  let made;
  return () => (made === undefined ? (made = make()) : made);
}

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

// Three significant digits, as in the page's other numbers.
function number(value, signed, among) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const sign = value < 0 ? "−" : signed ? "+" : "";
  const exponent = (size) => Number(Math.abs(size).toExponential(2).split("e")[1]);
  const power = exponent(value);
  const reference = among ? exponent(among) : power;
  if (reference >= -3 && reference < 5) return sign + Math.abs(value).toFixed(Math.max(0, 2 - power));
  const raised = String(power).split("").map((letter) => RAISED[letter]).join("");
  return `${sign}${(Math.abs(value) / 10 ** power).toFixed(2)}·10${raised}`;
}

const count = (value) => value.toLocaleString("en-US");
const percent = (share) => `${Math.round(100 * share)}%`;
const plural = (value, one, many) => `${count(value)} ${value === 1 ? one : many || `${one}s`}`;

const train = {
  index: unpack(DATA.train.index) || Int32Array.from({ length: DATA.numTrain }, (_, place) => place),
  selfInfluence: unpack(DATA.train.selfInfluence),
  harmed: unpack(DATA.train.harmed),
  net: unpack(DATA.train.net),
  disagreement: unpack(DATA.train.disagreement),
  suggested: unpack(DATA.train.suggested),
};

const columns = DATA.columns.map((column) => ({
  ...column,
  train: unpack(column.train),
  query: unpack(column.query),
}));
const labelColumn = columns.find((column) => column.isLabel) || null;

const places = once(() => {
  const found = new Map();
  train.index.forEach((index, place) => found.set(index, place));
  return found;
});

// Where the numbers of a training example stand; undefined where they were left out.
const placeOf = (index) => (DATA.train.index ? places().get(index) : index < DATA.numTrain ? index : undefined);

function labelOf(split, index) {
  if (!labelColumn) return null;
  const groups = split === "train" ? labelColumn.train : labelColumn.query;
  const place = split === "train" ? placeOf(index) : index;
  return groups && place !== undefined ? labelColumn.groups[groups[place]] : null;
}

const queries = {
  index: DATA.queries.index,
  order: unpack(DATA.queries.order),
  measurement: unpack(DATA.queries.measurement),
  spread: unpack(DATA.queries.spread),
  strength: unpack(DATA.queries.strength),
  proponents: unpack(DATA.queries.proponents),
  predictions: DATA.queries.predictions,
  wrong: DATA.queries.wrong,
};

const lists = new Map();
function listOf(row) {
  const packed = DATA.lists[row];
  if (!packed) return null;
  if (!lists.has(row)) {
    const list = { histogram: packed.histogram, agreement: packed.agreement, numTerms: packed.numTerms || 0 };
    for (const name of ["index", "score", "segments", "spread", "sameSign", "inTop", "terms", "stands"]) list[name] = unpack(packed[name]);
    list.ranks = (packed.ranks || []).map(unpack);
    list.others = (packed.others || []).map(unpack);
    lists.set(row, list);
  }
  return lists.get(row);
}
