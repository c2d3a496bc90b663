/** Entry of the site's script: each part loads only where its element is. */

import "./main.css";
import { takeAddress } from "./connection";
import { startCopyButton } from "./copy";
import { startReadButton } from "./read";

takeAddress();
window.addEventListener("hashchange", () => {
  if (takeAddress()) location.reload();
});

for (const part of document.querySelectorAll<HTMLElement>(".wm-js"))
  part.hidden = false;
for (const button of document.querySelectorAll<HTMLButtonElement>(".wm-copy"))
  startCopyButton(button);
for (const button of document.querySelectorAll<HTMLButtonElement>(".wm-read button"))
  startReadButton(button);

const map = document.getElementById("wm-map");
if (map) void import("./map").then(({ startMap }) => startMap(map));

if (document.querySelector(".arithmatex"))
  void import("./math").then(({ renderMath }) => renderMath());

const cells = document.querySelectorAll<HTMLElement>(".wm-cell");
if (cells[0])
  void import("./cell")
    .then((m) => m.startCells(cells))
    .then(() => import("./kernel"))
    .then((m) => m.startKernelPanel(cells[0]!));

for (const part of document.querySelectorAll<HTMLElement>(".wm-calculator"))
  void import("./calculator").then((m) => m.startCalculator(part));

for (const part of document.querySelectorAll<HTMLElement>(".wm-trace"))
  void import("./trace").then((m) => m.startTrace(part));
