// Queries: searched, sorted, and one of them with its proponents and opponents.

const queryState = { text: "", sort: "order", label: "", only: "all", selected: null, order: [], shown: 0 };
const PAGE = 60;

const queryTexts = once(() => Array.from({ length: DATA.numQueries }, (_, row) => {
  const entry = exampleOf("query", queries.index[row]);
  const row_ = entry && entry.row ? Object.entries(entry.row).flat().join(" ") : "";
  return [`#${queries.index[row]}`, labelOf("query", row) || "", queries.predictions[row] || "", entry ? entry.caption : "", entry ? entry.text || "" : "", row_].join(" ").toLowerCase();
}));

const known = (values) => values && values.length > 0;

function querySorts() {
  const judged = queries.wrong.length ? "wrong, then worst first" : known(queries.measurement) ? "worst first" : null;
  const sorts = judged ? [["order", judged], ["row", "by number"]] : [["order", "by number"]];
  if (known(queries.measurement)) sorts.push(["loss", "worst first"], ["best", "best first"]);
  if (labelColumn && labelColumn.query) sorts.push(["label", "by label"]);
  if (known(queries.spread)) sorts.push(["spread", "largest spread of the ensemble first"]);
  sorts.push(["weak", "weakest proponents first"]);
  if (DATA.agreement.length) sorts.push(["agreement", "least agreement of files first"]);
  return sorts;
}

const agreementOf = once(() => {
  const found = new Map();
  if (DATA.agreement.length) DATA.listed.forEach((row, place) => found.set(row, Math.min(...DATA.agreement.map((other) => other.rank[place]))));
  return found;
});

const queryOrders = new Map();
function orderOf(sort) {
  if (!queryOrders.has(sort)) {
    const rows = Array.from(queries.order);
    const by = (measure) => rows.sort((one, two) => measure(one) - measure(two));
    if (sort === "row") rows.sort((one, two) => one - two);
    if (sort === "loss") by((row) => -queries.measurement[row]);
    if (sort === "best") by((row) => queries.measurement[row]);
    if (sort === "label") by((row) => labelColumn.query[row]);
    if (sort === "spread") by((row) => -queries.spread[row]);
    if (sort === "weak") by((row) => queries.strength[row]);
    if (sort === "agreement") by((row) => agreementOf().get(row) ?? 2);
    queryOrders.set(sort, rows);
  }
  return queryOrders.get(sort);
}

function filterQueries() {
  const words = queryState.text.toLowerCase().split(/\s+/).filter(Boolean);
  const group = queryState.label === "" ? null : Number(queryState.label);
  queryState.order = orderOf(queryState.sort).filter((row) =>
    (group === null || labelColumn.query[row] === group) &&
    (queryState.only === "all" || (queryState.only === "wrong" ? queries.wrong[row] === 1 : queries.wrong[row] === 0)) &&
    words.every((word) => queryTexts()[row].includes(word)));
}

function queryLine(row) {
  const index = queries.index[row];
  const wrong = queries.wrong[row] === 1;
  const label = captionOf("query", index, row);
  const text = (exampleOf("query", index) || {}).text;
  const selected = queryState.selected === row;
  return h("li", {},
    h("a", { href: `#query-${row}`, "data-row": row, "aria-current": selected ? "true" : null, class: wrong ? "is-wrong" : null },
      picture("query", index, 36),
      h("span", { class: "words" },
        h("span", { class: "first" }, h("b", {}, `#${index}`), " ", label ? h("span", { class: "data" }, label) : null, wrong ? h("span", { class: "wrong-mark" }, " ✗ wrong") : null),
        h("span", { class: "second data" }, text ? text.slice(0, 90) : queries.predictions[row] ? `predicted ${queries.predictions[row]}` : "")),
      known(queries.measurement) ? h("span", { class: "numeric" }, number(DATA.words.sign * queries.measurement[row])) : null));
}

function showQueryList(more) {
  const list = document.getElementById("query-list");
  if (!more) { queryState.shown = 0; list.replaceChildren(); }
  const next = queryState.order.slice(queryState.shown, queryState.shown + PAGE);
  list.append(...next.map(queryLine));
  queryState.shown += next.length;
  document.getElementById("query-count").textContent =
    queryState.order.length === DATA.numQueries ? plural(DATA.numQueries, "query", "queries") : `${count(queryState.order.length)} of ${plural(DATA.numQueries, "query", "queries")}`;
  document.getElementById("more-queries").hidden = queryState.shown >= queryState.order.length;
}

function changeQueries(change) {
  Object.assign(queryState, change);
  filterQueries();
  showQueryList(false);
}

function histogram(list, shown) {
  const { counts, largest } = list.histogram;
  const width = 340, height = 130, left = 8, right = 332, top = 8, bottom = 104;
  const most = Math.sqrt(Math.max(...counts, 1));
  const slot = (right - left) / counts.length;
  const x = (value) => left + ((value / largest + 1) / 2) * (right - left);
  const label = (text, at, anchor) => svg("text", { x: at, y: height - 8, "text-anchor": anchor }, text);
  return h("figure", { class: "when" },
    svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Histogram of the scores of ${count(DATA.numScored)} training examples` },
      counts.map((size, place) => {
        if (!size) return null;
        const tall = Math.max(1, (Math.sqrt(size) / most) * (bottom - top));
        const middle = ((place + 0.5) / counts.length) * 2 - 1;
        return svg("rect", { class: Math.abs(middle) < 0.02 ? "neutral" : kindOf(middle), x: left + place * slot, width: 0.85 * slot, y: bottom - tall, height: tall },
          svg("title", {}, `${count(size)} examples near ${number(middle * largest, true, largest)}`));
      }),
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      shown.map((value) => svg("circle", { class: "mark", cx: x(value), cy: bottom, r: 3 })),
      label(number(-largest, true), left, "start"), label("0", (left + right) / 2, "middle"), label(number(largest, true), right, "end")),
    h("figcaption", {}, `Scores of all ${DATA.numScored < DATA.numTrain ? "scored " : ""}training examples; heights are square roots of counts, circles are the examples shown.`));
}

function bySegment(sums, caption, kinds) {
  const names = DATA.segments;
  const width = 340, height = 130, left = 8, right = 332, top = 8, bottom = 104;
  const values = sums.flat();
  const high = Math.max(0, ...values), low = Math.min(0, ...values), span = high - low || 1;
  const y = (value) => top + ((high - value) / span) * (bottom - top);
  const slot = (right - left) / names.length, thick = Math.min(26, (0.72 * slot) / sums.length);
  const every = Math.ceil((names.length * 7 * Math.max(...names.map((name) => name.length))) / (right - left));
  return h("figure", { class: "when" },
    svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": caption },
      sums.map((parts, series) => parts.map((value, place) =>
        svg("rect", { class: kinds ? kinds[series] : kindOf(value), x: left + slot * (place + 0.5) + thick * (series - sums.length / 2), width: 0.92 * thick, y: Math.min(y(0), y(value)), height: Math.max(Math.abs(y(value) - y(0)), 0.5) },
          svg("title", {}, `${names[place]}: ${number(value, true)}`)))),
      svg("line", { class: "axis", x1: left, x2: right, y1: y(0), y2: y(0) }),
      names.map((name, place) => (place % every ? null : svg("text", { x: left + slot * (place + 0.5), y: height - 8, "text-anchor": "middle" }, name)))),
    h("figcaption", {}, caption));
}

const listState = { proponent: 8, opponent: 8, sort: "score", stable: false };

function entryOf(list, place) {
  const segments = DATA.segments.length && list.segments ? Array.from(list.segments.subarray(place * DATA.segments.length, (place + 1) * DATA.segments.length)) : null;
  return {
    place, index: list.index[place], score: list.score[place], segments,
    spread: list.spread ? list.spread[place] : null, sameSign: list.sameSign ? list.sameSign[place] : null, inTop: list.inTop ? list.inTop[place] : null,
    terms: list.terms && (place + 1) * list.numTerms <= list.terms.length ? list.terms.subarray(place * list.numTerms, (place + 1) * list.numTerms) : null,
    stands: list.stands ? list.stands[place] : 0,
    others: list.others.map((values) => values[place]), ranks: list.ranks.map((values) => values[place]),
  };
}

function entriesOf(list, kind) {
  const sign = kind === "proponent" ? HELPS : -HELPS;
  const entries = Array.from(list.index, (_, place) => entryOf(list, place)).filter((entry) => sign * entry.score > 0);
  const strongest = Math.max(...Array.from(list.score, Math.abs), Number.MIN_VALUE);
  const measures = {
    score: (entry) => -Math.abs(entry.score),
    stable: (entry) => -(entry.spread ? Math.abs(entry.score) / entry.spread : Infinity),
    stands: (entry) => -(entry.stands || (Math.abs(entry.score) / strongest) * 1e-9),
    differ: (entry) => -Math.max(...entry.ranks.slice(1).map((rank) => Math.abs(rank - entry.ranks[0]))),
  };
  const measure = measures[listState.sort];
  return entries.filter((entry) => !listState.stable || entry.sameSign === DATA.members).sort((one, two) => measure(one) - measure(two));
}

// Marked where the sign changes from run to run.
function runsThatAgree(entry) {
  const marks = entry.sameSign < DATA.members ? { class: "unstable", title: "its sign changes from run to run" } : {};
  return h("span", marks, `${entry.sameSign}/${DATA.members} runs agree`);
}

function saidOf(entry, kind, strongest, tallest) {
  const others = DATA.others.map((name, other) => h("div", { class: "faint" }, h("span", { class: "data" }, name), `: ${number(entry.others[other], true, strongest)}, rank ${count(entry.ranks[other + 1] + 1)}`));
  const ensemble = DATA.members && entry.spread !== null
    ? h("div", { class: "faint" }, `± ${number(entry.spread, false, strongest)}, `, runsThatAgree(entry), kind === "proponent" && DATA.numTrain > 50 ? `, among the top 50 in ${entry.inTop}/${DATA.members} runs` : null) : null;
  return [
    h("span", { class: `score ${kind}` }, number(entry.score, true, strongest)),
    h("span", { class: "meter" }, h("span", { class: kind, style: { width: `${(100 * Math.abs(entry.score)) / strongest}%` } })),
    entry.segments ? sparkline(entry.segments, tallest) : null,
    ensemble,
    kind === "proponent" && entry.stands ? h("div", { class: "faint" }, `stands for ${percent(entry.stands)} of those listed`) : null,
    others.length ? h("div", { class: "faint" }, `rank ${count(entry.ranks[0] + 1)}`) : null, others,
  ];
}

function showList(row, list, kind) {
  const entries = entriesOf(list, kind);
  const strongest = Math.max(...Array.from(list.score, Math.abs), 0);
  const tallest = list.segments ? Math.max(...Array.from(list.segments, Math.abs)) : 0;
  const shown = entries.slice(0, listState[kind]);
  const more = entries.length - shown.length;
  const section = h("section", { class: "tail", id: `tail-${kind}`, "aria-label": `${kind}s` },
    h("h3", { class: kind }, DATA.words.headings[kind], h("small", { class: "data" }, DATA.words.effects[kind])),
    shown.length ? h("ol", { class: "items" }, shown.map((entry) => card(entry.index, saidOf(entry, kind, strongest, tallest), entry.terms)))
      : h("p", { class: "faint" }, listState.stable ? "None has one sign in all runs." : `No ${DATA.words.examples} has a ${kind === (HELPS > 0 ? "proponent" : "opponent") ? "positive" : "negative"} score for this query.`),
    more > 0 ? button(`${Math.min(more, 24)} more`, () => { listState[kind] += 24; showTails(row); }, { class: "more" }) : null);
  section.shownScores = shown.map((entry) => entry.score);
  section.shownSegments = shown.map((entry) => entry.segments).filter(Boolean);
  return section;
}

function sumOf(parts) {
  return DATA.segments.map((_, place) => parts.reduce((sum, each) => sum + each[place], 0));
}

function showTails(row) {
  const list = listOf(row);
  const tails = ["proponent", "opponent"].map((kind) => showList(row, list, kind));
  document.getElementById("tails").replaceChildren(...tails);
  const charts = [histogram(list, tails.flatMap((tail) => tail.shownScores))];
  const parts = tails.map((tail) => tail.shownSegments);
  if (DATA.segments.length && parts.flat().length)
    charts.push(bySegment(parts.map(sumOf), "When in training they mattered: the sums over the proponents and opponents shown, by segment (optimizer steps).", ["proponent", "opponent"]));
  document.getElementById("query-charts").replaceChildren(...charts);
}

// The query itself: as its section shows it, where it has one.
function subjectOf(row) {
  const section = document.getElementById(`query-${row}`);
  const made = section && section.querySelector(".subject");
  if (made) return made.cloneNode(true);
  const index = queries.index[row];
  const entry = exampleOf("query", index);
  return h("div", { class: "subject" }, picture("query", index, 112), player("query", index),
    entry && entry.text !== undefined ? h("blockquote", { class: "data", dir: "auto" }, entry.text) : null, cellsOf(entry, 14),
    captionOf("query", index, row) ? h("p", { class: "caption data" }, captionOf("query", index, row)) : null,
    entry ? null : h("p", { class: "faint" }, "How it looks is not kept in this page."));
}

function groupBars(row) {
  const place = DATA.listed.indexOf(row);
  if (place < 0 || !DATA.groups.length) return null;
  return h("details", { class: "by-group" }, h("summary", {}, "Sums by group of training examples"),
    DATA.groups.map((group) => {
      const names = columns.find((column) => column.name === group.name).groups;
      const sums = unpack(group.sums).subarray(place * names.length, (place + 1) * names.length);
      const whole = unpack(group.segments);
      const parts = whole ? names.map((_, number_) => DATA.segments.map((__, segment) => whole[(segment * DATA.listed.length + place) * names.length + number_])) : null;
      return groupTable(group.name, names, sums, parts);
    }));
}

function showQuery(row) {
  const panel = document.getElementById("query-panel");
  if (queryState.selected !== row) Object.assign(listState, { proponent: 8, opponent: 8 });
  queryState.selected = row;
  for (const line of document.querySelectorAll("#query-list a")) {
    if (Number(line.dataset.row) === row) line.setAttribute("aria-current", "true");
    else line.removeAttribute("aria-current");
  }
  const list = listOf(row);
  const wrong = queries.wrong[row];
  const facts = h("dl", { class: "facts-of" },
    queries.predictions[row] ? fact("prediction", [h("span", { class: "data strong" }, queries.predictions[row]), wrong === 1 ? [" ", h("span", { class: "chip wrong-mark" }, "wrong")] : null]) : null,
    labelOf("query", row) ? fact("label", h("span", { class: "data" }, labelOf("query", row))) : null,
    known(queries.measurement) ? fact(h("span", { class: "data" }, QUANTITY), number(DATA.words.sign * queries.measurement[row])) : null,
    fact("sum of all scores that help", number(HELPS * queries.strength[row], true)),
    fact("effective number of proponents", number(queries.proponents[row])),
    known(queries.spread) ? fact("spread of the ensemble", `${percent(queries.spread[row])} of the scores`) : null,
    list && list.agreement !== undefined && list.agreement !== null ? fact("rank correlation between runs", list.agreement.toFixed(2)) : null,
    agreementOf().has(row) ? DATA.agreement.map((other) => { const at = DATA.listed.indexOf(row); return fact(h("span", { class: "data" }, other.name), `rank correlation ${other.rank[at] === null ? "–" : other.rank[at].toFixed(2)}, ${percent(other.overlap[at])} of the top 50 shared`); }) : null);
  const sorts = [["score", "strongest first"]];
  if (listState.sort === "stands" && !(list && list.stands)) listState.sort = "score";
  if (list && list.stands) sorts.push(["stands", "a few that stand for the others first"]);
  if (DATA.members) sorts.push(["stable", "most stable over the ensemble first"]);
  if (DATA.others.length) sorts.push(["differ", "largest difference in rank first"]);
  const options = sorts.length > 1 ? h("p", { class: "tools" }, select("order of proponents and opponents", sorts, listState.sort, (sort) => { listState.sort = sort; showTails(row); }),
    DATA.members ? h("label", {}, h("input", { type: "checkbox", checked: listState.stable, on: { change: (event) => { listState.stable = event.target.checked; showTails(row); } } }), " one sign in all runs") : null) : null;
  fill(panel,
    h("h2", {}, `Query ${queries.index[row]}`, " ", h("a", { class: "self", href: `#query-${row}`, "aria-label": "link to this query" }, "¶")),
    h("div", { class: "overview" }, subjectOf(row), facts, h("div", { id: "query-charts", class: "charts" })),
    list ? [options, h("div", { id: "tails" }), groupBars(row)]
      : h("p", { class: "faint" }, `The training examples of this query are not kept in this page, which has those of ${count(DATA.listed.length)} queries. Write a page about it: queries=[${row}].`));
  if (list) showTails(row);
}

function nextQuery(step) {
  if (!queryState.order.length) return;
  const at = queryState.order.indexOf(queryState.selected);
  const next = Math.min(Math.max(at + step, 0), queryState.order.length - 1);
  while (queryState.shown <= next) showQueryList(true);
  location.hash = `query-${queryState.order[next]}`;
  const line = document.querySelector(`#query-list a[data-row="${queryState.order[next]}"]`);
  if (line) line.scrollIntoView({ block: "nearest" });
}

function queriesTab() {
  filterQueries();
  const labels = labelColumn && labelColumn.query ? select("label", [["", "all labels"], ...labelColumn.groups.map((name, place) => [String(place), name])], "", (label) => changeQueries({ label })) : null;
  const wrong = queries.wrong.length ? select("predictions", [["all", "all predictions"], ["wrong", "wrong"], ["right", "right"]], "all", (only) => changeQueries({ only })) : null;
  return h("div", { class: "queries" },
    h("div", { class: "finder" },
      search("Search queries (/)", (text) => changeQueries({ text })),
      h("div", { class: "tools" }, select("order of queries", querySorts(), "order", (sort) => changeQueries({ sort })), labels, wrong),
      h("p", { class: "faint", id: "query-count", role: "status" }),
      h("ol", { id: "query-list" }),
      button("more queries", () => showQueryList(true), { id: "more-queries", class: "more" })),
    h("section", { id: "query-panel", "aria-live": "off" }));
}
