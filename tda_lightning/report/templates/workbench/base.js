// Building blocks: elements, drawings and the page's numbers. Text only ever becomes text nodes.

const NAMESPACE = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("aria-")) element.setAttribute(name, String(value));
    else if (value === false) continue;
    else if (name === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  build(document.createElementNS(NAMESPACE, tag), attributes, children);

function fill(element, ...children) {
  element.replaceChildren();
  return build(element, null, children);
}

function button(text, act, attributes) {
  return h("button", { type: "button", on: { click: act }, ...attributes }, text);
}

function select(label, options, value, change) {
  const box = h("select", { "aria-label": label, on: { change: () => change(box.value) } },
    options.map(([name, text]) => h("option", { value: name }, text)));
  box.value = value;
  return box;
}

function search(label, change) {
  const box = h("input", { type: "search", placeholder: label, "aria-label": label, on: { input: () => change(box.value) } });
  return box;
}

function announce(text) {
  const place = document.getElementById("announced");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => place.classList.remove("shown"), 6000);
}
