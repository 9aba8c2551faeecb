"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("slider"), words = document.getElementById("words");
const play = document.getElementById("play");
const NONE = data.ops.indexOf("none");

function table(kind) {
  const element = document.getElementById(`heat-${["normal", "reduce"].indexOf(kind)}`);
  const head = element.createTHead().insertRow();
  head.append(...["edge", ...data.ops].map((name) => Object.assign(document.createElement("th"), {textContent: name, scope: "col"})));
  const body = element.createTBody();
  return data.edges.map((name) => {
    const row = body.insertRow();
    row.append(Object.assign(document.createElement("th"), {textContent: name, scope: "row"}));
    return data.ops.map(() => row.insertCell());
  });
}

function paint(kind, edge, p) {
  const best = p.indexOf(Math.max(...p)), box = `${data.prefix}-${kind}-${kind}-${data.boxes[edge]}`;
  const colour = data.colours[best], none = best === NONE;
  const name = `${data.ops[best]} ${p[best].toFixed(2)}`;
  cells[kind][edge].forEach((cell, op) => {
    cell.textContent = Math.round(100 * p[op]);
    cell.style.background = `rgba(var(--heat), ${(0.75 * p[op]).toFixed(3)})`;
    cell.className = op === best ? "best" : "";
  });
  const group = document.getElementById(box);
  if (!group) return;  // without Graphviz there is no picture
  const text = group.querySelector("text");
  text.textContent = name;
  text.style.fill = none ? "#6b747d" : colour;
  for (const shape of group.querySelectorAll("path, polygon, polyline")) {
    shape.style.stroke = colour;
    shape.style.strokeDasharray = none ? "3 3" : "none";
  }
  for (const end of ["in", "out"]) {
    for (const shape of document.getElementById(`${box}-${end}`).querySelectorAll("path, polygon")) {
      shape.style.stroke = colour;
      if (shape.tagName === "polygon") shape.style.fill = colour;
      else shape.style.strokeWidth = none ? 0.6 : 0.8 + 2.2 * p[best];
      shape.style.opacity = none ? 0.5 : 1;
    }
  }
}

const cells = {normal: table("normal"), reduce: table("reduce")};

function show() {
  const epoch = Number(slider.value);
  words.textContent = data.words[epoch];
  slider.setAttribute("aria-valuetext", data.words[epoch]);
  for (const kind of ["normal", "reduce"]) data.p[kind][epoch].forEach((p, edge) => paint(kind, edge, p));
}

let timer = null;
function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "play";
  play.setAttribute("aria-pressed", "false");
}
play.addEventListener("click", () => {
  if (timer !== null) return stop();
  if (slider.value === slider.max) slider.value = 0;
  play.textContent = "stop";
  play.setAttribute("aria-pressed", "true");
  show();
  timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) stop();
  }, 300);
});
slider.addEventListener("input", () => { if (timer !== null) stop(); show(); });
show();
