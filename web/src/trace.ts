/** The player of a trace: frames that Python recorded, drawn one by one.
 *
 * The page holds the frames of the function's defaults. Other inputs call the
 * same function again, in the browser's Python.
 */

import {
  clearErrors,
  functionOf,
  readForm,
  say,
  showError,
  startForm,
} from "./form";
import { layOut, type Picture } from "./pictures";
import { Drawing, type Mark, type Scene } from "./scene";

interface Frame {
  caption: string;
  pictures: Picture[];
}

/** What `warpmap_site.traces.replay` answers. */
type Answer =
  | { frames: Frame[]; words: string[][] }
  | { error: string; field: string | null };

const MARKS: [Mark, string][] = [
  ["on", "in use"],
  ["new", "new"],
  ["gone", "gone"],
  ["wait", "waiting"],
];
const ICONS = {
  play: "M8 5v14l11-7z",
  pause: "M7 5h4v14H7zm6 0h4v14h-4z",
  again: "M12 5V1L7 6l5 5V7a5 5 0 1 1-5 5H5a7 7 0 1 0 7-7z",
  back: "M6 6h2v12H6zm3.5 6 8.5 6V6z",
  forward: "M16 6h2v12h-2zM6 18l8.5-6L6 6z",
};

function element<K extends keyof HTMLElementTagNameMap>(
  name: K,
  className: string,
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

function button(name: keyof typeof ICONS, label: string): HTMLButtonElement {
  const made = element("button", `wm-trace-${name}`);
  made.type = "button";
  draw(made, name, label);
  return made;
}

function draw(
  button: HTMLButtonElement,
  icon: keyof typeof ICONS,
  label: string,
): void {
  if (button.dataset["icon"] === icon) return;
  button.dataset["icon"] = icon;
  button.setAttribute("aria-label", label);
  button.title = label;
  button.innerHTML = `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${ICONS[icon]}"/></svg>`;
}

export function startTrace(part: HTMLElement): void {
  const stage = part.querySelector<HTMLElement>(".wm-trace-stage")!;
  const caption = part.querySelector<HTMLElement>(".wm-trace-caption")!;
  const data = part.querySelector(".wm-trace-data")?.textContent ?? "[]";
  let frames = JSON.parse(data) as Frame[];
  let at = 0;
  let timer = 0; // 0 where it does not play
  let drawings: Drawing[] = [];
  let scenes: Scene[][] = []; // by picture, then by frame

  // -- controls ---------------------------------------------------------------

  const play = button("play", "Play");
  const back = button("back", "One step back");
  const forward = button("forward", "One step forward");
  const scrub = element("input", "wm-trace-scrub");
  scrub.type = "range";
  scrub.min = "1";
  scrub.setAttribute("aria-label", "Step");
  const counter = element("span", "wm-trace-count");
  const speed = element("select", "wm-trace-speed");
  speed.setAttribute("aria-label", "Speed");
  for (const times of [0.5, 1, 2, 4])
    speed.append(new Option(`${times}×`, String(times), times === 1, times === 1));
  const controls = element(
    "div",
    "wm-trace-controls",
    play,
    back,
    forward,
    scrub,
    counter,
    speed,
  );
  const legend = element("ul", "wm-trace-legend");
  legend.setAttribute("aria-label", "Marks");
  stage.after(caption, controls, legend);
  stage.tabIndex = 0;
  stage.setAttribute("role", "group");
  stage.setAttribute("aria-label", "Picture of the step; arrow keys move on");
  caption.setAttribute("aria-live", "polite");

  // -- drawing ----------------------------------------------------------------

  const context = document.createElement("canvas").getContext("2d");
  const measure = (text: string, small = false): number => {
    if (!context) return text.length * (small ? 7 : 8);
    const family = getComputedStyle(stage).fontFamily;
    context.font = `500 ${small ? 12 : 13}px ${family}`;
    // digits are drawn as wide as a 0
    return context.measureText(text.replace(/\d/g, "0")).width;
  };

  function arrange(): void {
    const style = getComputedStyle(stage);
    const edge = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
    const width = stage.clientWidth - edge;
    if (width <= 0) return; // inside something that is not shown
    const known = new Map<string, number>();
    const remember = (text: string, small = false): number => {
      const key = `${small} ${text}`;
      let size = known.get(key);
      if (size === undefined) known.set(key, (size = measure(text, small)));
      return size;
    };
    const count = frames[0]?.pictures.length ?? 0;
    scenes = Array.from({ length: count }, (_, i) =>
      layOut(
        frames.map((frame) => frame.pictures[i]!),
        width,
        remember,
      ),
    );
    // the longest caption decides, so that nothing below it moves
    caption.style.minHeight = "";
    const shown = caption.textContent;
    let high = 0;
    for (const { caption: text } of frames) {
      caption.textContent = text;
      high = Math.max(high, caption.offsetHeight);
    }
    caption.textContent = shown;
    caption.style.minHeight = `${high}px`;
    show();
  }

  function show(): void {
    const frame = frames[at];
    if (!frame) return;
    drawings.forEach((drawing, i) => {
      const scene = scenes[i]?.[at];
      if (scene) drawing.show(scene);
    });
    if (caption.textContent !== frame.caption)
      caption.textContent = frame.caption;
    scrub.value = String(at + 1);
    scrub.setAttribute("aria-valuetext", `Step ${at + 1} of ${frames.length}`);
    counter.textContent = `${at + 1} / ${frames.length}`;
    back.disabled = at === 0;
    forward.disabled = at === frames.length - 1;
    part.dataset["step"] = String(at + 1);
    showPlay();
  }

  function showPlay(): void {
    if (timer) draw(play, "pause", "Pause");
    else if (at === frames.length - 1) draw(play, "again", "Play again");
    else draw(play, "play", "Play");
  }

  function begin(): void {
    drawings = (frames[0]?.pictures ?? []).map(() => new Drawing());
    stage.replaceChildren(...drawings.map(({ svg }) => svg));
    scrub.max = String(frames.length);
    const used = new Set(marksOf(frames));
    legend.replaceChildren(
      ...MARKS.filter(([mark]) => used.has(mark)).map(([mark, text]) => {
        const swatch = element("span", "wm-swatch");
        swatch.dataset["mark"] = mark;
        return element("li", "", swatch, text);
      }),
    );
    at = 0;
    arrange();
  }

  // -- moving -----------------------------------------------------------------

  function go(step: number): void {
    pause();
    at = Math.max(0, Math.min(frames.length - 1, step));
    show();
  }

  function pause(): void {
    clearTimeout(timer);
    timer = 0;
    caption.setAttribute("aria-live", "polite");
    showPlay();
  }

  function run(): void {
    // a caption stays as long as it takes to read it
    const text = frames[at]?.caption.length ?? 0;
    const wait = Math.max(1300, 38 * text) / Number(speed.value);
    timer = window.setTimeout(() => {
      at += 1;
      if (at >= frames.length - 1) pause();
      else run();
      show();
    }, wait);
  }

  function start(): void {
    if (frames.length < 2) return;
    caption.setAttribute("aria-live", "off"); // it would talk all the time
    if (at >= frames.length - 1) at = 0;
    run();
    show();
  }

  play.addEventListener("click", () => (timer ? pause() : start()));
  back.addEventListener("click", () => go(at - 1));
  forward.addEventListener("click", () => go(at + 1));
  scrub.addEventListener("input", () => go(Number(scrub.value) - 1));
  speed.addEventListener("change", () => {
    if (!timer) return;
    clearTimeout(timer);
    run();
  });
  const player = stage.parentElement!;
  player.addEventListener("keydown", (event) => {
    if (event.target === speed || event.altKey || event.ctrlKey || event.metaKey)
      return;
    const steps: Record<string, number> = {
      ArrowLeft: at - 1,
      ArrowRight: at + 1,
      Home: 0,
      End: frames.length - 1,
    };
    const step = steps[event.key];
    if (step !== undefined) go(step);
    else if (event.key === " " && !(event.target instanceof HTMLButtonElement))
      play.click();
    else return;
    event.preventDefault();
  });

  // -- other inputs -----------------------------------------------------------

  const form = part.querySelector("form");
  if (form) startInputs(part, form, (answer) => {
    pause();
    frames = answer.frames;
    begin();
    writeSteps(part, answer);
  }, () => {
    go(0);
    start();
    stage.focus({ preventScroll: true });
  });

  begin();
  void document.fonts.ready.then(arrange); // widths were another font's
  let wide = stage.clientWidth;
  new ResizeObserver(() => {
    if (stage.clientWidth === wide) return;
    wide = stage.clientWidth;
    arrange();
  }).observe(stage);
}

/** Every mark that some frame has. */
function* marksOf(frames: Frame[]): Generator<Mark> {
  const cells = (rows: Extract<Picture, { form: "grid" }>["rows"]): Mark[] =>
    rows.flatMap(([, row]) =>
      row.map((cell) => (typeof cell === "string" ? "" : (cell[1] ?? ""))),
    );
  for (const { pictures } of frames)
    for (const picture of pictures) {
      if (picture.form === "grid") yield* cells(picture.rows);
      else if (picture.form === "lanes")
        for (const [, spans] of picture.lanes)
          yield* spans.map((span) => span[3] ?? "");
      else if (picture.form === "tree")
        yield* picture.nodes.map((node) => node[3] ?? "");
      else yield* cells(picture.nodes);
    }
}

/** The table of steps, for the inputs of now. */
function writeSteps(
  part: HTMLElement,
  { frames, words }: Extract<Answer, { frames: unknown }>,
): void {
  const rows = frames.map(({ caption }, i) => {
    const lines = (words[i] ?? []).flatMap((line, n) =>
      n ? [document.createElement("br"), line] : [line],
    );
    return element(
      "tr",
      "",
      element("td", "", String(i + 1)),
      element("td", "", caption),
      element("td", "", ...lines),
    );
  });
  part.querySelector(".wm-trace-steps tbody")?.replaceChildren(...rows);
  const summary = part.querySelector(".wm-trace-steps summary");
  if (summary) summary.textContent = `All ${frames.length} steps in words`;
}

/** Wakes the form: a change makes new frames, a button plays them. */
function startInputs(
  part: HTMLElement,
  form: HTMLFormElement,
  accept: (answer: Extract<Answer, { frames: unknown }>) => void,
  playFrom: () => void,
): void {
  const replay = element("button", "wm-trace-replay", "Replay");
  replay.type = "button";
  form.querySelector(".wm-form-actions")?.prepend(replay, " ");
  let shown = JSON.stringify(readForm(form)); // what the frames are of
  let working: Promise<boolean> | null = null;

  const compute = async (): Promise<boolean> => {
    for (;;) {
      const now = JSON.stringify(readForm(form));
      if (now === shown) {
        clearErrors(form);
        return true;
      }
      part.setAttribute("aria-busy", "true");
      const answer = await ask(form);
      part.removeAttribute("aria-busy");
      if (now !== JSON.stringify(readForm(form))) continue; // newer values
      if ("error" in answer) {
        showError(form, answer.error, answer.field);
        return false;
      }
      clearErrors(form);
      shown = now;
      accept(answer);
      say(form, `${answer.frames.length} steps, computed in this browser.`);
      return true;
    }
  };
  const refresh = (): Promise<boolean> =>
    (working ??= compute().finally(() => (working = null)));

  replay.addEventListener("click", () =>
    void refresh().then((good) => good && playFrom()),
  );
  const details = form.closest("details");
  startForm(form, () => {
    if (details) details.open = true;
    void refresh();
  });
}

async function ask(form: HTMLFormElement): Promise<Answer> {
  try {
    const { call } = await import("./pyodide");
    return (await call(
      "warpmap_site.traces",
      "replay",
      [functionOf(form), readForm(form)],
      (line) => say(form, line),
    )) as Answer;
  } catch (error) {
    return { error: (error as Error).message, field: null };
  }
}
