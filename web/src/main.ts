/** Entry of the site's script: each part loads only where its element is. */

import "./main.css";
import { startCopyButton } from "./copy";
import { startReadButton } from "./read";

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
