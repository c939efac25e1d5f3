"use strict";
// Everything from the service is shown as text: nothing of it becomes markup.
const at = (id) => document.getElementById(id);
let token = sessionStorage.getItem("token") || "";
let health = null;
let latest = 0; // the newest search; answers to older ones are dropped

function make(tag, options = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), options);
  made.append(...inside.filter((one) => one !== null && one !== undefined));
  return made;
}

async function ask(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  at("entrance").hidden = response.status !== 401;
  if (!response.ok) throw new Error(answer.error || `The service answered ${response.status}.`);
  return answer;
}

function say(text, failed = false) {
  at("message").textContent = text;
  at("message").className = failed ? "failed" : "faint";
}

// How an example looks: a picture, a sound, a text, a row of a table, or its caption alone.
function look(example) {
  const parts = [];
  if (example.image) parts.push(make("img", { src: example.image, alt: example.caption || "", width: 96 }));
  if (example.sound) parts.push(make("audio", { src: example.sound, controls: true }));
  if (example.row) {
    const cells = Object.entries(example.row).map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
    parts.push(make("dl", { className: "cells" }, ...cells));
  }
  if (example.text !== undefined) parts.push(make("p", { className: "text data", textContent: example.text }));
  if (example.caption) parts.push(make("span", { className: "caption data", textContent: example.caption }));
  return parts;
}

function meter(share) {
  const bar = make("span");
  bar.style.width = `${share}%`;
  return make("span", { className: "meter" }, bar);
}

const readable = (score) =>
  (score > 0 ? "+" : "−") + (Math.abs(score) >= 1e-3 && Math.abs(score) < 1e4
    ? Math.abs(score).toPrecision(4) : Math.abs(score).toExponential(2));

async function list(kind, found, strongest, mine) {
  // Examples that were appended to the index are not in the training set, which has the pictures.
  const looks = await Promise.all(found.map((one) =>
    one.index < health.train ? ask(`examples/${one.index}`) : { caption: "appended" }));
  if (mine !== latest) return;
  const pictures = looks.some((one) => one.image);
  const items = found.map((one, place) => {
    const score = make("span", { className: `score ${kind}`, textContent: readable(one.score) });
    const bar = meter((100 * Math.abs(one.score)) / strongest);
    bar.classList.add(kind);
    const number = make("span", { className: "faint", textContent: `example ${one.index}` });
    if (pictures) return make("li", {}, ...look(looks[place]), score, bar, number);
    return make("li", {}, make("div", { className: "side" }, score, bar),
      make("div", {}, ...look(looks[place]), make("p", { className: "faint" }, number)));
  });
  const where = at(`${kind}s`);
  where.replaceChildren(items.length ? make("ul", { className: `${pictures ? "cards" : "texts"}` }, ...items)
    : make("p", { className: "faint", textContent: "None." }));
}

async function show() {
  const index = Number(at("index").value);
  try {
    const example = await ask(`examples/${index}?split=query`);
    if (Number(at("index").value) !== index) return;
    const words = example.text === undefined ? look(example) : [
      make("blockquote", { className: "data", textContent: example.text }),
      ...look({ ...example, text: undefined })];
    at("query").replaceChildren(...words);
  } catch (error) {
    at("query").replaceChildren();
    say(error.message, true);
  }
}

function measurement() {
  const name = at("measurement").value;
  if (!name) return undefined;
  const asked = { name };
  for (const key of ["target", "foil"]) {
    const given = at(key).value.trim();
    if (given && !at(key).parentElement.hidden) asked[key] = /^\d+$/.test(given) ? Number(given) : given;
  }
  return asked;
}

async function search(query) {
  const mine = ++latest;
  say("Searching …");
  try {
    const body = { query, k: Number(at("k").value), rerank: Number(at("rerank").value) };
    if (body.rerank && body.rerank < body.k) body.rerank = body.k;
    const asked = measurement();
    if (asked) body.measurement = asked;
    const answer = await ask("search", body);
    if (mine !== latest) return;
    const both = [...answer.proponents, ...answer.opponents];
    const strongest = Math.max(...both.map((one) => Math.abs(one.score)), 1e-300);
    // With few examples the lists overlap: each shows those of its own sign.
    await list("proponent", answer.proponents.filter((one) => one.score > 0), strongest, mine);
    await list("opponent", answer.opponents.filter((one) => one.score < 0), strongest, mine);
    if (mine !== latest) return;
    const name = answer.query.index === undefined ? "your own example" : `query ${answer.query.index}`;
    at("asked").textContent = `of ${name}, asked about ${answer.measurement}`;
    at("answer").hidden = false;
    const rescored = answer.reranked ? `, ${answer.reranked} rescored exactly` : "";
    say(`Searched ${health.searched.toLocaleString("en")} training examples in ${answer.seconds.toFixed(3)} s${rescored}.`);
  } catch (error) {
    if (mine === latest) say(error.message, true);
  }
}

const searchForIndex = () => search({ index: Number(at("index").value) });

function step(by) {
  const most = health ? health.queries - 1 : 0;
  at("index").value = Math.min(most, Math.max(0, Number(at("index").value) + by));
  show();
  searchForIndex();
}

function settings() {
  const name = at("measurement").value;
  document.querySelector(".of-class").hidden = !name || name === "output";
  document.querySelector(".of-foil").hidden = name !== "contrast";
}

async function begin() {
  try {
    health = await ask("health");
  } catch (error) {
    at("facts").textContent = "";
    say(error.message, true);
    return;
  }
  say("");
  const facts = [health.run, `${health.train.toLocaleString("en")} training examples`,
    `${health.queries.toLocaleString("en")} queries`, health.index];
  at("facts").replaceChildren(...facts.filter(Boolean).map((text) => make("span", { textContent: text })));
  at("index").max = health.queries - 1;
  at("k").max = health.limits.k;
  at("rerank").max = health.limits.rerank;
  at("form").textContent = health.example;
  at("own").hidden = !health.example;
  // Anew when a token was entered again.
  const own = at("measurement").options[0];
  at("measurement").replaceChildren(own, ...health.measurements.map((name) =>
    make("option", { value: name, textContent: name.replace("_", " ") })));
  const linked = /^#query-(\d+)$/.exec(location.hash);
  if (linked) at("index").value = linked[1];
  await show();
}

at("asking").addEventListener("submit", (event) => { event.preventDefault(); searchForIndex(); });
at("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  sessionStorage.setItem("token", token);
  begin();
});
at("index").addEventListener("change", show);
at("previous").addEventListener("click", () => step(-1));
at("next").addEventListener("click", () => step(1));
at("measurement").addEventListener("change", settings);
at("copy").addEventListener("click", async () => {
  try {
    const whole = await ask(`examples/${Number(at("index").value)}?split=query&form=true`);
    at("example").value = JSON.stringify(whole.example);
  } catch (error) { say(error.message, true); }
});
at("ask-own").addEventListener("click", () => {
  try {
    search({ example: JSON.parse(at("example").value) });
  } catch (error) { say(`This is not JSON: ${error.message}`, true); }
});
begin();
