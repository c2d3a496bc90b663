/** Cells: a snippet's panel, which a reader runs and edits in place.
 *
 * Where a cell can run is a list of runners. Those of the browser are there
 * from the start; a kernel is offered to all cells once it is connected.
 */

import { browserRunner } from "./pyodide";
import type { Output, Runner } from "./python";

const QUICK = 200; // milliseconds; a run that is over by then shows no Stop
const INDENT = "    ";

interface Cell {
  places: string[]; // the topic's runs_on
  offer(runner: Runner): void;
  withdraw(runner: Runner): void;
}

const cells: Cell[] = [];

export function startCells(panels: Iterable<HTMLElement>): void {
  for (const panel of panels) {
    const bar = panel.querySelector<HTMLElement>(".wm-run");
    if (!bar) continue; // the snippet belongs to no topic
    const places = (bar.dataset["runs"] ?? "").split(" ");
    cells.push(
      startCell(panel, places, places.includes("browser") ? [browserRunner()] : []),
    );
  }
}

/** Lets all cells run there, too; `several` starts several processes. */
export function offerRunner(runner: Runner, several: Runner): void {
  for (const cell of cells)
    cell.offer(cell.places.includes("multi-gpu") ? several : runner);
}

export function withdrawRunner(runner: Runner): void {
  for (const cell of cells) cell.withdraw(runner);
}

function startCell(
  panel: HTMLElement,
  places: string[],
  runners: Runner[],
): Cell {
  const part = <Part extends HTMLElement>(name: string): Part =>
    panel.querySelector<Part>(name)!;
  const bar = part(".wm-run");
  const go = part<HTMLButtonElement>(".wm-go");
  const edit = part<HTMLButtonElement>(".wm-edit");
  const reset = part<HTMLButtonElement>(".wm-reset");
  const choice = part<HTMLSelectElement>(".wm-runner");
  const said = part(".wm-said");
  const progress = part(".wm-progress");
  const shown = part(".highlight");
  const label = part(".wm-output-label");
  const printed = part(".wm-output pre");
  const elsewhere = panel.querySelector<HTMLElement>(".wm-elsewhere");

  const recorded = printed.textContent ?? "";
  const original = shown.textContent?.trimEnd() ?? "";
  let editor: HTMLTextAreaElement | null = null;
  let running: Runner | null = null;
  let ended = Promise.resolve(); // the last run
  let started = 0; // when the run began, loading left out

  function draw(): void {
    bar.hidden = !runners.length;
    if (elsewhere) elsewhere.hidden = runners.length > 0;
    const chosen = choice.value;
    choice.replaceChildren(...runners.map(({ name }) => new Option(name)));
    choice.hidden = runners.length < 2;
    if (runners.some(({ name }) => name === chosen)) choice.value = chosen;
  }

  // -- running ----------------------------------------------------------------

  /** The output of a run takes the place of what was there when it begins. */
  function newOutput(): Output & { begin(): void } {
    let begun = false;
    const begin = (): void => {
      if (begun) return;
      begun = true;
      label.textContent = "Output of your run";
      printed.replaceChildren();
    };
    return {
      begin,
      text(chunk, stream) {
        begin();
        let last = printed.lastElementChild as HTMLElement | null;
        if (last?.dataset["stream"] !== stream) {
          last = document.createElement("span");
          last.dataset["stream"] = stream;
          printed.append(last);
        }
        last.append(chunk);
      },
      image(png) {
        begin();
        const image = document.createElement("img");
        image.alt = "Image drawn by the code";
        image.src = `data:image/png;base64,${png}`;
        printed.append(image);
      },
      progress(line) {
        progress.textContent = line;
        if (!line) started = performance.now();
      },
    };
  }

  async function run(): Promise<void> {
    const runner = runners[Math.max(0, choice.selectedIndex)];
    if (!runner) return;
    running = runner;
    said.textContent = "Running";
    go.setAttribute("aria-busy", "true");
    const quick = setTimeout(() => (go.textContent = "Stop"), QUICK);
    const output = newOutput();
    started = performance.now();
    try {
      await runner.run(editor?.value ?? original, output);
      const seconds = (performance.now() - started) / 1000;
      said.textContent = `Finished in ${seconds.toFixed(2)} s`;
      output.begin();
      if (!printed.hasChildNodes()) said.textContent += ", nothing was printed";
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error);
      output.text(message, "stderr");
      said.textContent = message.startsWith("Stopped") ? "Stopped" : "Failed";
    }
    clearTimeout(quick);
    running = null;
    progress.textContent = "";
    go.textContent = "Run";
    go.removeAttribute("aria-busy");
    reset.hidden = false;
  }

  go.addEventListener("click", () => {
    if (!running) ended = run();
    else if (go.textContent === "Stop") running.stop();
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (!running) ended = run();
  });

  // -- editing ----------------------------------------------------------------

  edit.addEventListener("click", () => {
    editor = newEditor(original, `Code of ${panel.dataset["file"] ?? "the cell"}`);
    shown.hidden = true;
    shown.after(editor);
    edit.hidden = true;
    reset.hidden = false;
    said.textContent = "Tab indents. Escape, then Tab, leaves the code.";
    fit(editor);
    editor.focus();
  });

  reset.addEventListener("click", async () => {
    running?.stop();
    await ended;
    editor?.remove();
    editor = null;
    shown.hidden = edit.hidden = false;
    reset.hidden = true;
    label.textContent = "Output";
    printed.textContent = recorded;
    said.textContent = "";
    go.focus();
  });

  draw();
  return {
    places,
    offer(runner) {
      runners.push(runner);
      draw();
    },
    withdraw(runner) {
      runners = runners.filter((other) => other !== runner);
      draw();
    },
  };
}

/** A text field that indents like an editor, and lets the keyboard out. */
function newEditor(code: string, name: string): HTMLTextAreaElement {
  const field = document.createElement("textarea");
  field.className = "wm-editor";
  field.value = code;
  field.wrap = "off";
  field.spellcheck = false;
  field.autocapitalize = "off";
  field.setAttribute("autocorrect", "off");
  field.setAttribute("aria-label", name);
  let leaving = false; // Escape was pressed last
  field.addEventListener("keydown", (event) => {
    const line = field.value.slice(0, field.selectionStart).split("\n").pop()!;
    const plain = !(event.ctrlKey || event.metaKey || event.altKey);
    if (event.key === "Tab" && !event.shiftKey && plain && !leaving) {
      event.preventDefault();
      insert(INDENT.slice(line.length % INDENT.length));
    } else if (event.key === "Enter" && plain) {
      event.preventDefault();
      const indent = /^ */.exec(line)![0];
      insert(`\n${indent}${line.trimEnd().endsWith(":") ? INDENT : ""}`);
    }
    leaving = event.key === "Escape";
  });
  field.addEventListener("input", () => fit(field));
  return field;

  /** Typed for the reader: unlike setting `value`, this can be undone. */
  function insert(text: string): void {
    document.execCommand("insertText", false, text);
  }
}

/** As many rows as the code has lines. */
function fit(field: HTMLTextAreaElement): void {
  field.rows = field.value.split("\n").length;
}
