/** Calculators: a change calls the very Python that the tests run. */

import {
  clearErrors,
  functionOf,
  readForm,
  say,
  showError,
  startForm,
} from "./form";

interface Shown {
  name: string;
  text: string;
  unit: string;
  note: string;
}

/** What `warpmap_site.forms.evaluate` answers. */
type Answer =
  | { results: Shown[]; svg?: string; table?: string[][] }
  | { error: string; field: string | null };

export function startCalculator(part: HTMLElement): void {
  const form = part.querySelector("form");
  const answer = part.querySelector<HTMLElement>(".wm-answer");
  if (!form || !answer) return;
  let running = false;
  let again = false;

  const compute = async (): Promise<void> => {
    if (running) {
      again = true; // the newest values only
      return;
    }
    running = true;
    do {
      again = false;
      answer.setAttribute("aria-busy", "true");
      const got = await ask(form, part.dataset["chart"] ?? "");
      if (!again) show(form, answer, got);
    } while (again);
    answer.removeAttribute("aria-busy");
    running = false;
  };
  startForm(form, () => void compute());
}

async function ask(form: HTMLFormElement, chart: string): Promise<Answer> {
  try {
    const { call } = await import("./pyodide");
    const given = {
      function: functionOf(form),
      arguments: readForm(form),
      chart,
    };
    const progress = (line: string): void => say(form, line);
    return (await call(
      "warpmap_site.forms",
      "evaluate",
      given,
      progress,
    )) as Answer;
  } catch (error) {
    return { error: (error as Error).message, field: null };
  }
}

function show(form: HTMLFormElement, part: HTMLElement, got: Answer): void {
  const failed = "error" in got;
  part.classList.toggle("wm-answer-old", failed);
  if (failed) {
    showError(form, got.error, got.field);
    return;
  }
  clearErrors(form);
  for (const result of got.results) {
    const row = part.querySelector(`[data-result="${result.name}"]`);
    for (const [place, text] of [
      [".wm-value", result.text],
      [".wm-unit", result.unit],
      [".wm-note", result.note],
    ] as const) {
      const found = row?.querySelector(place);
      if (found) found.textContent = text;
    }
  }
  if (got.svg) showChart(part, got.svg, got.table ?? []);
  say(form, "Computed in this browser.");
}

function showChart(part: HTMLElement, svg: string, table: string[][]): void {
  const drawn = new DOMParser().parseFromString(svg, "image/svg+xml");
  const root = drawn.documentElement;
  if (root.nodeName === "svg")
    part.querySelector(".wm-chart")?.replaceChildren(root);

  const [head = [], ...rows] = table;
  const row = (texts: string[], cell: "th" | "td"): HTMLElement => {
    const made = document.createElement("tr");
    for (const text of texts) {
      const one = document.createElement(cell);
      if (cell === "th") one.setAttribute("scope", "col");
      one.textContent = text;
      made.append(one);
    }
    return made;
  };
  const data = part.querySelector(".wm-chart-data table");
  data?.querySelector("thead")?.replaceChildren(row(head, "th"));
  data
    ?.querySelector("tbody")
    ?.replaceChildren(...rows.map((texts) => row(texts, "td")));
}
