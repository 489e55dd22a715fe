"use strict";
const records = JSON.parse(document.getElementById("records").textContent);
const tokens = [...document.querySelectorAll("[role=option]")];
const charts = [...document.querySelectorAll(".scroll > svg")];
const box = document.getElementById("detail");
let current = 0;

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size === 0 ? "0" : Math.min(size, 1 / size) >= 1e-3 ? value.toPrecision(3) : value.toExponential(2);
}

function row(table, head, cells) {
  const line = table.appendChild(element("tr"));
  line.append(head, ...cells);
}

/** A model's own choice: the token's text, its id beside it. */
function choice([text, id]) {
  const cell = element("td");
  if (text !== null) cell.append(element("code", text), " ");
  cell.append(element("span", "id " + id, "id"));
  return cell;
}

/** What acted, with its marker. */
function rule(record) {
  const line = element("p");
  if (record.alpha.length === 0) {
    line.append("no fusion");
    return line;
  }
  const space = "http://www.w3.org/2000/svg";
  const svg = line.appendChild(document.createElementNS(space, "svg"));
  svg.setAttribute("viewBox", "0 0 14 14");
  svg.setAttribute("class", "m " + record.class);
  const path = svg.appendChild(document.createElementNS(space, "path"));
  path.setAttribute("d", record.marker);
  path.setAttribute("class", "mark " + record.class);
  const active = record.alpha.filter(([name]) => record.expert === null || name === record.expert);
  line.append(active.map(([name, alpha]) => name + ", α " + Number(alpha.toPrecision(3))).join(" · "));
  if (record.changed === true) line.append(" · ", element("b", "changed by fusion"));
  return line;
}

function head(record) {
  const line = element("p");
  line.append(element("code", record.text, "big"), " ");
  line.append(element("span", "id " + record.id + ", step " + record.step, "id"));
  return [line, rule(record)];
}

function choices(record) {
  const table = element("table", undefined, "choices");
  table.append(element("caption", "What each alone would have said"));
  if (record.large) row(table, element("th", "large"), [choice(record.large)]);
  for (const [name, own] of record.experts) row(table, element("th", name), [choice(own)]);
  return table;
}

function terms(record) {
  const table = element("table");
  table.append(element("caption", "KL terms (nats), their targets, and the loss"));
  const heads = ["fused", ...record.names.map((name) => "→ " + name)];
  row(table, element("th"), heads.map((name) => element("th", name, "n")));
  ["KL(fused‖large)", "KL(large‖fused)"].forEach((name, i) => {
    const [reached, aims] = record.kl[i];
    row(table, element("th", name), [reached, ...aims].map((value) => element("td", number(value), "n")));
  });
  row(table, element("th", "loss"), [element("td", number(record.loss), "n")]);
  return table;
}

/** Shows token i in the box and in the charts. */
function show(i) {
  tokens[current].setAttribute("aria-selected", "false");
  tokens[current].tabIndex = -1;
  current = i;
  tokens[i].setAttribute("aria-selected", "true");
  tokens[i].tabIndex = 0;
  const record = records[i];
  box.replaceChildren(...head(record));
  if (record.large || record.experts.length) box.append(choices(record));
  if (record.names.length) box.append(terms(record));
  for (const chart of charts) {
    const cursor = chart.querySelector(".cursor"), pitch = +chart.dataset.pitch;
    const x = (i - chart.dataset.first) * pitch, width = chart.width.baseVal.value;
    const inside = Math.min(x, width - pitch - x) >= 0;
    cursor.classList.toggle("on", inside);
    if (!inside) continue;
    cursor.setAttribute("x", x);
    const view = chart.parentNode, over = x + pitch * 3 - view.scrollLeft - view.clientWidth;
    if (over > 0) view.scrollLeft += over;
    else if (view.scrollLeft > x - pitch * 2) view.scrollLeft = x - pitch * 2;
  }
}

/** The token of the line above or below that is nearest to token i. */
function beside(i, step) {
  const from = tokens[i].getBoundingClientRect();
  let best = i, row = null, distance = Infinity;
  for (let j = i + step; tokens[j]; j += step) {
    const to = tokens[j].getBoundingClientRect();
    if (Math.abs(to.bottom - from.bottom) > 4) {
      row ??= to.bottom;
      if (Math.abs(to.bottom - row) > 4) break;
      if (Math.abs(to.left - from.left) < distance) [best, distance] = [j, Math.abs(to.left - from.left)];
    }
  }
  return best;
}

function target(i, key) {
  switch (key) {
    case "ArrowRight": return Math.min(i + 1, tokens.length - 1);
    case "ArrowLeft": return Math.max(i - 1, 0);
    case "ArrowDown": return beside(i, 1);
    case "ArrowUp": return beside(i, -1);
    case "Home": return tokens.indexOf(tokens[i].parentNode.firstElementChild);
    case "End": return tokens.indexOf(tokens[i].parentNode.lastElementChild);
    default: return null;
  }
}

tokens.forEach((token, i) => {
  token.onmouseenter = token.onfocus = () => show(i);
  token.onkeydown = (event) => {
    const to = event.ctrlKey || event.altKey || event.metaKey ? null : target(i, event.key);
    if (to === null) return;
    event.preventDefault();
    tokens[to].focus();
  };
});
for (const chart of charts) {
  chart.onmousemove = chart.onclick = (event) => {
    const last = chart.width.baseVal.value / chart.dataset.pitch - 1;
    const column = Math.floor((event.clientX - chart.getBoundingClientRect().left) / chart.dataset.pitch);
    show(+chart.dataset.first + Math.min(Math.max(column, 0), last));
  };
}

const root = document.documentElement, theme = document.getElementById("theme");
const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const name = () => { theme.textContent = dark() ? "Light theme" : "Dark theme"; };
theme.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; name(); };
matchMedia("(prefers-color-scheme: dark)").onchange = name;
name();
for (const input of document.querySelectorAll("[name=by]")) {
  input.onchange = () => root.classList.toggle("by-alpha", input.value === "alpha");
  if (input.checked) input.onchange();
}
const hint = box.firstElementChild;
show(0);
box.append(hint);
