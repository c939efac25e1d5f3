// Several files of scores, and the runs of an ensemble: agreement, and where they differ.

const mean = (values) => { const finite = values.filter((value) => value !== null); return finite.length ? finite.reduce((sum, value) => sum + value, 0) / finite.length : NaN; };
const two = (value) => (value === null || Number.isNaN(value) ? "–" : value.toFixed(2).replace("-", "−"));

function differences() {
  const found = [];
  for (const row of DATA.listed) {
    const list = listOf(row);
    if (!list) continue;
    DATA.others.forEach((name, other) => {
      list.index.forEach((index, place) => {
        const ranks = [list.ranks[0][place], list.ranks[other + 1][place]];
        // Ranks from either end: the strongest proponent of one may be an opponent of the other.
        const strength = ranks.map((rank) => Math.min(rank, DATA.numScored - 1 - rank));
        if (Math.min(...strength) < 10) found.push({ row, name, index, ranks, scores: [list.score[place], list.others[other][place]], size: Math.abs(ranks[0] - ranks[1]) });
      });
    });
  }
  return found.sort((one, other) => other.size - one.size).slice(0, 30);
}

function queryAgreement(values, name) {
  const order = DATA.listed.map((row, place) => [row, values[place]]).filter(([, value]) => value !== null).sort((one, other) => one[1] - other[1]);
  return h("div", { class: "scroll" }, h("table", {},
    h("caption", {}, `Least agreement: ${name}`),
    h("tbody", {}, order.slice(0, 10).map(([row, value]) => h("tr", {}, h("td", {}, h("a", { href: `#query-${row}` }, `query ${queries.index[row]}`)), h("td", { class: "data" }, captionOf("query", queries.index[row], row)), h("td", { class: "numeric" }, two(value)))))));
}

function compareTab() {
  const parts = [];
  if (DATA.agreement.length) {
    parts.push(h("h2", {}, "Agreement with other files of scores"),
      h("div", { class: "scroll" }, h("table", {},
        h("thead", {}, h("tr", {}, ["scores", "rank correlation", "lowest", "strongest 50 proponents shared", "self-influence"].map((name, place) => h("th", { class: place ? "numeric" : null }, name)))),
        h("tbody", {}, DATA.agreement.map((other) => h("tr", {}, h("td", { class: "data" }, other.name), h("td", { class: "numeric" }, two(mean(other.rank))), h("td", { class: "numeric" }, two(Math.min(...other.rank))), h("td", { class: "numeric" }, percent(mean(other.overlap))), h("td", { class: "numeric" }, two(other.self_influence))))))),
      h("p", { class: "faint" }, `Spearman’s correlation over the training examples, averaged over the ${plural(DATA.listed.length, "query", "queries")} with a list in this page.`),
      h("div", { class: "side-by-side" }, DATA.agreement.map((other) => queryAgreement(other.rank, other.name))),
      h("h3", {}, "Where they differ most", h("small", {}, "training examples among the ten strongest of one file, by the difference of their ranks")),
      h("div", { class: "scroll" }, h("table", {},
        h("thead", {}, h("tr", {}, ["query", "example", "label", "score here", "rank here", "score there", "rank there", DATA.others.length > 1 ? "scores" : null].filter(Boolean).map((name) => h("th", { class: name === "label" || name === "scores" ? null : "numeric" }, name)))),
        h("tbody", {}, differences().map((entry) => h("tr", {},
          h("td", { class: "numeric" }, h("a", { href: `#query-${entry.row}` }, queries.index[entry.row])), h("td", { class: "numeric" }, link(entry.index)), h("td", { class: "data" }, captionOf("train", entry.index)),
          h("td", { class: "numeric" }, number(entry.scores[0], true)), h("td", { class: "numeric" }, count(entry.ranks[0] + 1)), h("td", { class: "numeric" }, number(entry.scores[1], true)), h("td", { class: "numeric" }, count(entry.ranks[1] + 1)), DATA.others.length > 1 ? h("td", { class: "data" }, entry.name) : null))))));
  }
  if (DATA.members) {
    const values = DATA.listed.map((row) => (listOf(row) || {}).agreement ?? null);
    const stable = DATA.listed.map((row) => { const list = listOf(row); let all = 0, same = 0; list.score.forEach((score, place) => { if (HELPS * score > 0) { all += 1; same += list.sameSign[place] === DATA.members; } }); return all ? same / all : null; });
    parts.push(h("h2", {}, "Agreement between the runs of the ensemble"),
      h("dl", { class: "facts-of" }, fact("runs", DATA.members), fact("rank correlation between runs, mean over queries", two(mean(values))),
        fact("proponents with one sign in all runs, of those listed", percent(mean(stable)))),
      h("p", { class: "prose" }, "Whether a single example helps may depend on the run. Each query has its most stable proponents under “most stable over the ensemble first”: those with the largest mean over its standard error."),
      h("div", { class: "side-by-side" }, queryAgreement(values, "rank correlation between runs"), queryAgreement(stable, "share of proponents with one sign in all runs")));
  }
  return h("div", { class: "compare" }, parts);
}
