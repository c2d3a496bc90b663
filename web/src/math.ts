/** Formulas: what pymdownx.arithmatex marks, drawn by KaTeX. */

import katex from "katex";

export function renderMath(): void {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("math.css", import.meta.url).href;
  document.head.append(style);

  for (const part of document.querySelectorAll<HTMLElement>(".arithmatex")) {
    const source = (part.textContent ?? "").trim(); // \(...\) or \[...\]
    katex.render(source.slice(2, -2), part, {
      displayMode: source.startsWith("\\["),
      throwOnError: false,
    });
  }
}
