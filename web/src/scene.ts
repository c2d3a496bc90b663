/** A drawing of keyed parts: what keeps its key moves to its new place. */

export type Mark = "" | "on" | "new" | "gone" | "wait";

interface Part {
  key: string;
  x: number;
  y: number;
}

/** A rectangle with lines of text, and smaller ones under them. */
export interface Box extends Part {
  kind: "box";
  width: number;
  height: number;
  mark: Mark;
  lines: string[];
  notes?: string[];
  title?: string; // the whole text, where `lines` is cut
  look?: "group" | "chip";
  from?: [number, number]; // where it starts when it appears
}

export interface Label extends Part {
  kind: "label";
  lines: string[];
  anchor?: "start" | "middle" | "end";
  strong?: boolean;
}

/** A line; its path keeps its commands, so that only numbers change. */
export interface Wire {
  kind: "wire";
  key: string;
  path: string;
  look?: "arrow" | "axis" | "now";
  mark?: Mark;
}

export type Item = Box | Label | Wire;

export interface Scene {
  width: number;
  height: number;
  items: Item[];
}

export const LINE = 18; // height of a line of text
export const NOTE = 16; // of a smaller one
const SVG = "http://www.w3.org/2000/svg";
const LEAVE = 300; // ms, as in traces.css
let count = 0;

export function calm(): boolean {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

function make<K extends keyof SVGElementTagNameMap>(
  name: K,
  attributes: Record<string, string | number> = {},
): SVGElementTagNameMap[K] {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes))
    made.setAttribute(key, String(value));
  return made;
}

/** One SVG that shows scene after scene. */
export class Drawing {
  readonly svg = make("svg", { "aria-hidden": "true", focusable: "false" });
  private readonly parts = new Map<string, SVGGElement>();
  private readonly layers = [make("g"), make("g"), make("g")] as const;
  private readonly hatch = `wm-hatch-${(count += 1)}`;

  constructor() {
    const pattern = make("pattern", {
      id: this.hatch,
      width: 7,
      height: 7,
      patternUnits: "userSpaceOnUse",
      patternTransform: "rotate(45)",
    });
    pattern.append(make("path", { d: "M0 0V7", class: "wm-hatch" }));
    const defs = make("defs");
    defs.append(pattern);
    this.svg.append(defs, ...this.layers);
  }

  show(scene: Scene): void {
    for (const [name, value] of [
      ["width", scene.width],
      ["height", scene.height],
      ["viewBox", `0 0 ${scene.width} ${scene.height}`],
    ] as const)
      this.svg.setAttribute(name, String(value));

    const fresh: [SVGGElement, Item][] = [];
    const kept = new Set<string>();
    for (const item of scene.items) {
      const key = `${item.kind} ${item.key}`;
      kept.add(key);
      let part = this.parts.get(key);
      if (!part) {
        part = make("g", { class: "wm-part wm-enter" });
        this.parts.set(key, part);
        this.layers[layer(item)].append(part);
        this.write(part, item);
        const [x, y] = startOf(item);
        part.style.transform = `translate(${x}px, ${y}px)`;
        fresh.push([part, item]);
      } else this.write(part, item);
      if (!fresh.some(([made]) => made === part)) place(part, item);
    }
    for (const [key, part] of this.parts) {
      if (kept.has(key)) continue;
      this.parts.delete(key);
      part.classList.add("wm-leave");
      setTimeout(() => part.remove(), calm() ? 0 : LEAVE);
    }
    if (!fresh.length) return;
    this.svg.getBoundingClientRect(); // they start from where they are now
    for (const [part, item] of fresh) {
      part.classList.remove("wm-enter");
      place(part, item);
    }
  }

  private write(part: SVGGElement, item: Item): void {
    const words = JSON.stringify(item.kind === "wire" ? 0 : item.lines);
    const same = part.dataset["words"] === words;
    part.dataset["words"] = words;
    if (item.kind === "wire") {
      const path = part.querySelector("path") ?? make("path");
      path.setAttribute("d", item.path);
      path.style.setProperty("d", `path("${item.path}")`);
      path.setAttribute("class", `wm-wire wm-${item.look ?? "plain"}`);
      part.append(path);
      mark(part, item.mark ?? "");
    } else if (item.kind === "label") {
      if (!same) part.replaceChildren(...texts(item.lines, 0, LINE, "wm-name"));
      part.classList.toggle("wm-strong", item.strong ?? false);
      part.style.textAnchor = item.anchor ?? "start";
    } else this.box(part, item, same);
  }

  private box(part: SVGGElement, box: Box, same: boolean): void {
    const rects = [...part.querySelectorAll("rect")];
    if (!rects.length)
      rects.push(
        make("rect", { rx: 4, class: "wm-box" }),
        make("rect", { rx: 4, fill: `url(#${this.hatch})`, class: "wm-waits" }),
      );
    for (const rect of rects) {
      rect.style.width = `${box.width}px`;
      rect.style.height = `${box.height}px`;
    }
    const notes = box.notes ?? [];
    const noted = JSON.stringify(notes);
    if (!same || part.dataset["notes"] !== noted || !part.childElementCount) {
      part.dataset["notes"] = noted;
      const high = box.lines.length * LINE + notes.length * NOTE;
      const top = (box.height - high) / 2;
      const title = make("title");
      title.textContent = box.title ?? "";
      part.replaceChildren(
        ...rects,
        ...(box.title ? [title] : []),
        ...texts(box.lines, top + LINE / 2, LINE, "wm-text"),
        ...texts(
          notes,
          top + box.lines.length * LINE + NOTE / 2,
          NOTE,
          "wm-note",
        ),
      );
    }
    for (const text of part.querySelectorAll("text"))
      text.setAttribute("x", String(box.width / 2));
    part.classList.toggle("wm-group", box.look === "group");
    part.classList.toggle("wm-chip-box", box.look === "chip");
    mark(part, box.mark);
  }
}

function layer(item: Item): 0 | 1 | 2 {
  if (item.kind === "wire") return item.look === "now" ? 2 : 0;
  if (item.kind === "box" && item.look === "group") return 0;
  return item.kind === "box" && item.look === "chip" ? 2 : 1;
}

function startOf(item: Item): [number, number] {
  if (item.kind === "wire") return [0, 0];
  return item.kind === "box" && item.from ? item.from : [item.x, item.y];
}

function place(part: SVGGElement, item: Item): void {
  if (item.kind !== "wire")
    part.style.transform = `translate(${item.x}px, ${item.y}px)`;
}

function mark(part: SVGGElement, mark: Mark): void {
  part.dataset["mark"] = mark;
}

function texts(
  lines: string[],
  first: number,
  step: number,
  name: string,
): SVGTextElement[] {
  return lines.map((line, i) => {
    const text = make("text", { y: first + i * step, class: name });
    text.textContent = line;
    return text;
  });
}
