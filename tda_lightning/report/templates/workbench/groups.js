// Groups: sums by a column of the data, group by group, by segment, and what is hardly covered.

const groupState = { train: 0, query: "" };

function groupTable(name, names, sums, parts) {
  const largest = Math.max(...Array.from(sums, Math.abs), 0);
  const tallest = parts ? Math.max(...parts.flat().map(Math.abs)) : 0;
  const order = names.map((_, place) => place).sort((one, two) => sums[two] - sums[one]);
  return h("div", { class: "scroll" }, h("table", { class: "sums" },
    h("thead", {}, h("tr", {}, h("th", { class: "data" }, name), h("th", { class: "numeric" }, "sum of scores"), h("th", {}), parts ? h("th", {}, "when") : null)),
    h("tbody", {}, order.map((place) => h("tr", {},
      h("td", { class: "data" }, names[place]), h("td", { class: `numeric ${kindOf(sums[place])}` }, number(sums[place], true, largest)),
      h("td", { class: "bar" }, h("span", { class: `meter ${kindOf(sums[place])}` }, h("span", { style: { width: `${largest ? (100 * Math.abs(sums[place])) / largest : 0}%` } }))),
      parts ? h("td", {}, sparkline(parts[place], tallest)) : null)))));
}

function matrixTable(group, trainColumn, queryColumn) {
  const values = unpack(group.matrices[queryColumn.name]);
  const width = trainColumn.groups.length;
  const largest = Math.max(...Array.from(values, Math.abs), 0);
  const sizes = new Array(queryColumn.groups.length).fill(0);
  queryColumn.query.forEach((place) => { sizes[place] += 1; });
  const said = h("p", { class: "faint prose" }, `Rows: queries by ${queryColumn.name}, mean of each group. Columns: training examples by ${trainColumn.name}, their scores summed. Removing the column’s whole group is predicted to change the row’s measurement by this much, to first order.`);
  return [said, h("div", { class: "scroll" }, h("table", { class: "matrix" },
    h("thead", {}, h("tr", {}, h("td", {}), trainColumn.groups.map((name) => h("th", { scope: "col", class: "data" }, h("span", {}, name))))),
    h("tbody", {}, queryColumn.groups.map((name, row) => (sizes[row] ? h("tr", {}, h("th", { scope: "row", class: "data" }, name),
      trainColumn.groups.map((other, column) => {
        const value = values[row * width + column];
        const share = largest ? Math.abs(value) / largest : 0;
        return h("td", { class: `numeric ${HELPS * value >= 0 ? "positive" : "negative"}`, style: { "--share": `${Math.round(100 * share)}%` }, title: `${name} ← ${other}` }, number(value, true, largest));
      })) : null)))))];
}

function regionTable(rows) {
  const withWrong = rows.some((row) => row.wrong !== null), withLoss = rows.some((row) => row.measurement !== null);
  return h("div", { class: "scroll" }, h("table", { class: "regions" },
    h("thead", {}, h("tr", {}, ["group", "queries", "training examples", withWrong ? "wrong" : null, withLoss ? "measurement" : null, "sum of scores that help", "effective proponents", ""].filter((name) => name !== null).map((name, place) => h("th", { class: place ? "numeric" : null }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", { class: row.few_and_weak ? "few" : null },
      h("td", { class: "data" }, row.group), h("td", { class: "numeric" }, count(row.queries)), h("td", { class: "numeric" }, count(row.training)),
      withWrong ? h("td", { class: "numeric" }, row.wrong === null ? "–" : percent(row.wrong)) : null,
      withLoss ? h("td", { class: "numeric" }, row.measurement === null ? "–" : number(row.measurement)) : null,
      h("td", { class: "numeric" }, number(row.strength)), h("td", { class: "numeric" }, number(row.proponents)),
      h("td", {}, row.few_and_weak ? h("span", { class: "chip wrong-mark" }, "few and weak") : ""))))));
}

function showGroups() {
  const place = document.getElementById("group-content");
  const parts = [];
  const group = DATA.groups[groupState.train];
  if (group) {
    const column = columns.find((each) => each.name === group.name);
    const others = columns.filter((each) => each.query);
    const chosen = others.find((each) => each.name === groupState.query) || others.find((each) => each.name === column.name) || others[0];
    const means = unpack(group.mean), whole = unpack(group.meanBySegment);
    const segments = whole ? column.groups.map((_, number_) => DATA.segments.map((__, segment) => whole[segment * column.groups.length + number_])) : null;
    parts.push(h("div", { class: "tools" },
      select("training examples by", DATA.groups.map((each, number_) => [String(number_), `training examples by ${each.name}`]), String(groupState.train), (value) => { groupState.train = Number(value); showGroups(); }),
      others.length ? select("queries by", others.map((each) => [each.name, `queries by ${each.name}`]), chosen.name, (value) => { groupState.query = value; showGroups(); }) : null));
    if (chosen) parts.push(h("h3", {}, "Group by group"), matrixTable(group, column, chosen));
    parts.push(h("h3", {}, "Mean over all queries", segments ? h("small", {}, `by segment of training: ${DATA.segments.join(", ")}`) : null), groupTable(group.name, column.groups, means, segments));
  } else {
    parts.push(h("p", { class: "faint" }, columns.length ? "Only some training examples were scored for each query, so sums over groups are not known." : "No column of the training data is known to group by. Give write_report(columns={name: values}), or a data module with group_columns."));
  }
  const names = [...new Set(DATA.regions.map((row) => row.column))];
  if (names.length) {
    parts.push(h("h2", {}, "Regions of the queries that the training set hardly covers"),
      h("p", { class: "prose" }, "A group of queries is under-represented where its proponents are few and weak: where both the sum of a query’s scores that help and their effective number (k equal ones count k) are below half of the median over the groups. Weakest first."));
    for (const name of names) parts.push(h("h3", { class: "data" }, `by ${name}`), regionTable(DATA.regions.filter((row) => row.column === name)));
  }
  fill(place, parts);
}

const groupsTab = () => h("div", { id: "group-content" });
