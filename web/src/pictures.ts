/** Where the parts of a trace's pictures go: grid, lanes, tree, ring.
 *
 * One unit is one pixel, so text keeps its size; what does not fit in the
 * width is broken, or the figure scrolls. All frames get one size.
 */

import { LINE, NOTE, type Box, type Item, type Mark, type Scene } from "./scene";

/** What `warpmap_site.traces.frames` writes. */
type CellData = string | [text?: string, mark?: Mark, key?: string];
type Row = [name: string, cells: CellData[]];
type SpanData = [start?: number, end?: number, text?: string, mark?: Mark];
type NodeData = [
  key: string,
  text?: string,
  parent?: string | null,
  mark?: Mark,
  note?: string,
];
type ArrowData = [source?: number, target?: number, text?: string, mark?: Mark];

interface Grid {
  form: "grid";
  rows: Row[];
  columns?: string[];
}
interface Lanes {
  form: "lanes";
  lanes: [name: string, spans: SpanData[]][];
  unit: string;
  end: number;
  now?: number;
}
interface Tree {
  form: "tree";
  nodes: NodeData[];
}
interface Ring {
  form: "ring";
  nodes: Row[];
  arrows: ArrowData[];
}
export type Picture = Grid | Lanes | Tree | Ring;

/** Width of a text in pixels. */
export type Measure = (text: string, small?: boolean) => number;

/** Scenes of one picture in all its frames. */
export function layOut(
  pictures: Picture[],
  width: number,
  measure: Measure,
): Scene[] {
  const scenes = draw(pictures, width, measure);
  const wide = Math.max(width, ...scenes.map((s) => s.width));
  const high = Math.max(...scenes.map((s) => s.height));
  return scenes.map(({ items }) => ({
    items,
    width: Math.ceil(wide),
    height: Math.ceil(high),
  }));
}

function draw(pictures: Picture[], width: number, measure: Measure): Scene[] {
  const words = new Words(measure);
  switch (pictures[0]?.form) {
    case "grid":
      return grids(pictures as Grid[], width, words);
    case "lanes":
      return lanes(pictures as Lanes[], width, words);
    case "tree":
      return trees(pictures as Tree[], width, words);
    case "ring":
      return rings(pictures as Ring[], width, words);
    default:
      return [];
  }
}

// -- text ---------------------------------------------------------------------

class Words {
  constructor(readonly measure: Measure) {}

  /** The widest of some texts; 0 of none. */
  widest(texts: Iterable<string>, small = false): number {
    let most = 0;
    for (const text of new Set(texts))
      most = Math.max(most, this.measure(text, small));
    return Math.ceil(most);
  }

  /** The text, cut to a width. */
  cut(text: string, width: number, small = false): string {
    if (this.measure(text, small) <= width) return text;
    let kept = text;
    while (kept && this.measure(`${kept}…`, small) > width)
      kept = kept.slice(0, -1);
    return kept ? `${kept.trimEnd()}…` : "";
  }

  /** The text in lines of a width. */
  wrap(text: string, width: number, small = false): string[] {
    const lines: string[] = [];
    let line = "";
    for (const word of text.split(" ")) {
      const longer = line ? `${line} ${word}` : word;
      if (!line || this.measure(longer, small) <= width) line = longer;
      else {
        lines.push(line);
        line = word;
      }
    }
    if (line) lines.push(line);
    return lines.map((l) => this.cut(l, width, small));
  }
}

function cell(data: CellData): { text: string; mark: Mark; key: string } {
  const [text = "", mark = "" as Mark, key = ""] =
    typeof data === "string" ? [data] : data;
  return { text, mark, key };
}

const most = (numbers: Iterable<number>): number => Math.max(0, ...numbers);

// -- grid ---------------------------------------------------------------------

const GAP = 3;
const CELL = 30; // height, and the least width

function grids(pictures: Grid[], width: number, words: Words): Scene[] {
  const rows = pictures.flatMap((p) => p.rows);
  const columns = pictures[0]?.columns ?? [];
  const texts = rows.flatMap(([, cells]) => cells.map((c) => cell(c).text));
  const table =
    columns.length > 0 && most(pictures.map((p) => p.rows.length)) > 1;
  const wide = Math.min(
    table ? 140 : 88, // memory in lines of a few cells at least
    Math.max(CELL, words.widest(texts) + 14, words.widest(columns, true) + 8),
  );
  const longest = most(rows.map(([, cells]) => cells.length));
  const named = words.widest(rows.map(([name]) => name));
  const full = longest * (wide + GAP) - GAP;
  // names above the rows where they would push the cells out of sight
  const above = named > 0 && named + 12 + full > width && width < 520;
  const left = named && !above ? Math.min(named, width * 0.4) + 12 : 0;
  let perLine = longest;
  if (!table && left + full > width) {
    perLine = Math.max(1, Math.floor((width - left + GAP) / (wide + GAP)));
    perLine = Math.ceil(longest / Math.ceil(longest / perLine)); // even lines
  }

  return pictures.map((picture) => {
    const items: Item[] = [];
    let y = 0;
    const heads = (from: number, at: number): void =>
      columns.slice(from, from + perLine).forEach((name, i) => {
        items.push({
          kind: "label",
          key: `column ${from + i}`,
          x: left + i * (wide + GAP) + wide / 2,
          y: at + 8,
          anchor: "middle",
          lines: [words.cut(name, wide, true)],
        });
      });
    if (table) {
      heads(0, 0);
      y += 18;
    }
    picture.rows.forEach(([name, cells], r) => {
      if (name) {
        items.push({
          kind: "label",
          key: `row ${r}`,
          x: 0,
          y: above ? y + 8 : y + CELL / 2 + (columns.length && !table ? 18 : 0),
          lines: [above ? name : words.cut(name, left - 10)],
          strong: true,
        });
        if (above) y += 20;
      }
      for (let from = 0; from < Math.max(1, cells.length); from += perLine) {
        if (columns.length && !table) {
          heads(from, y);
          y += 18;
        }
        cells.slice(from, from + perLine).forEach((data, i) => {
          const { text, mark, key } = cell(data);
          items.push(
            box(words, text, mark, {
              key: key || `${r} ${from + i}`,
              x: left + i * (wide + GAP),
              y,
              width: wide,
              height: CELL,
            }),
          );
        });
        y += CELL + GAP;
      }
      y += table ? 0 : 7;
    });
    return { items, width: left + perLine * (wide + GAP), height: y };
  });
}

function box(
  words: Words,
  text: string,
  mark: Mark,
  place: Pick<Box, "key" | "x" | "y" | "width" | "height">,
): Box {
  const shown = words.cut(text, place.width - 6);
  const title = shown === text ? {} : { title: text };
  return { kind: "box", mark, lines: shown ? [shown] : [], ...title, ...place };
}

// -- lanes --------------------------------------------------------------------

const LANE = 28;

/** Steps of 1, 2 or 5 times a power of ten, about `count` of them. */
function ticks(end: number, count: number): number[] {
  const rough = end / Math.max(1, count);
  const ten = 10 ** Math.floor(Math.log10(rough));
  const step = ([1, 2, 5, 10].find((m) => m * ten >= rough) ?? 10) * ten;
  const found: number[] = [];
  for (let i = 0; i * step <= end * 1.0001; i += 1)
    found.push(Number((i * step).toPrecision(6)));
  return found;
}

function lanes(pictures: Lanes[], width: number, words: Words): Scene[] {
  const end = most(pictures.map((p) => p.end)) || 1;
  const names = pictures.flatMap((p) => p.lanes.map(([name]) => name));
  const named = words.widest(names);
  const above = named > 0.25 * width;
  const left = named && !above ? named + 12 : 0;
  const room = width - left - 14;
  // wide enough for most of the texts, within reason
  const needs = pictures
    .flatMap((p) => p.lanes.flatMap(([, spans]) => spans))
    .filter(([start = 0, stop = 0, text]) => text && stop > start)
    .map(
      ([start = 0, stop = 0, text = ""]) =>
        (words.measure(text) + 8) / (stop - start),
    )
    .sort((a, b) => a - b);
  const need = (needs[Math.floor(needs.length * 0.9)] ?? 0) * end;
  const long = Math.max(room, Math.min(need, 3 * room));
  const x = (time: number): number => left + (time / end) * long;

  return pictures.map((picture) => {
    const items: Item[] = [];
    let y = 0;
    picture.lanes.forEach(([name, spans], l) => {
      if (name) {
        items.push({
          kind: "label",
          key: `lane ${l}`,
          x: 0,
          y: above ? y + 8 : y + LANE / 2,
          lines: [name],
          strong: true,
        });
        if (above) y += 20;
      }
      items.push({
        kind: "wire",
        key: `lane ${l}`,
        path: `M${x(0)} ${y + LANE + 3}L${x(end)} ${y + LANE + 3}`,
        look: "axis",
      });
      const seen = new Map<number, number>();
      for (const [start = 0, stop = 0, text = "", mark = ""] of spans) {
        const twin = seen.get(start) ?? 0;
        seen.set(start, twin + 1);
        items.push(
          box(words, text, mark, {
            key: `${l} ${start} ${twin}`,
            x: x(start) + 0.5,
            y,
            width: Math.max(2, x(stop) - x(start) - 1),
            height: LANE,
          }),
        );
      }
      y += LANE + 7;
    });
    const marks = ticks(end, Math.max(2, Math.floor(long / 70)));
    marks.forEach((tick, i) =>
      items.push(
        {
          kind: "wire",
          key: `tick ${tick}`,
          path: `M${x(tick)} 0L${x(tick)} ${y}`,
          look: "axis",
        },
        {
          kind: "label",
          key: `tick ${tick}`,
          x: x(tick),
          y: y + 12,
          anchor: i ? "middle" : "start",
          lines: [`${tick}${i === marks.length - 1 ? ` ${picture.unit}` : ""}`],
        },
      ),
    );
    if (picture.now !== undefined)
      items.push({
        kind: "wire",
        key: "now",
        path: `M${x(picture.now)} -4L${x(picture.now)} ${y + 2}`,
        look: "now",
      });
    return { items, width: left + long + 14, height: y + 26 };
  });
}

// -- tree ---------------------------------------------------------------------

interface Placed {
  key: string;
  mark: Mark;
  parent: Placed | null;
  children: Placed[];
  depth: number;
  text: string;
  note: string;
  lines: string[];
  notes: string[];
  width: number;
  height: number;
  x: number;
  y: number;
}

const STEP = 30; // between columns
const INDENT = 20;

function read(picture: Tree): Placed[] {
  const known = new Map<string, Placed>();
  for (const [key, text = "", parent, mark = "", note = ""] of picture.nodes) {
    const above = known.get(parent ?? "") ?? null;
    const node: Placed = {
      key,
      mark,
      text,
      note,
      parent: above,
      children: [],
      depth: above ? above.depth + 1 : 0,
      lines: [],
      notes: [],
      width: 0,
      height: 0,
      x: 0,
      y: 0,
    };
    above?.children.push(node);
    known.set(key, node);
  }
  return [...known.values()];
}

function fill(node: Placed, width: number, words: Words): void {
  node.lines = words.wrap(node.text, width - 20);
  node.notes = words.wrap(node.note, width - 20, true);
  const wide = Math.max(
    words.widest(node.lines),
    words.widest(node.notes, true),
  );
  node.width = Math.max(36, wide + 20);
  node.height = node.lines.length * LINE + node.notes.length * NOTE + 10;
}

function trees(pictures: Tree[], width: number, words: Words): Scene[] {
  const frames = pictures.map(read);
  const all = frames.flat();
  for (const wide of [190, 165, 140, 120]) {
    const columns: number[] = [];
    for (const node of all) {
      fill(node, wide, words);
      columns[node.depth] = Math.max(columns[node.depth] ?? 0, node.width);
    }
    const lefts = columns.map((_, depth) =>
      columns.slice(0, depth).reduce((sum, one) => sum + one + STEP, 0),
    );
    const total = (lefts.at(-1) ?? 0) + (columns.at(-1) ?? 0);
    if (total <= width) return frames.map((nodes) => across(nodes, lefts));
  }
  for (const node of all)
    fill(node, Math.max(110, width - node.depth * INDENT - 2), words);
  return frames.map(down);
}

/** Root on the left, children to the right of it. */
function across(nodes: Placed[], lefts: number[]): Scene {
  const gap = 12;
  const spans = new Map<Placed, number>();
  for (const node of [...nodes].reverse()) {
    const below = node.children.reduce((sum, c) => sum + spans.get(c)! + gap, -gap);
    spans.set(node, Math.max(node.height, below));
  }
  let high = 0;
  const tops = new Map<Placed, number>();
  for (const node of nodes) {
    if (!node.parent) {
      tops.set(node, high);
      high += spans.get(node)! + gap;
    }
    const span = spans.get(node)!;
    node.x = (lefts[node.depth] ?? 0) + 1;
    node.y = tops.get(node)! + (span - node.height) / 2 + 1;
    const below = node.children.reduce((sum, c) => sum + spans.get(c)! + gap, -gap);
    let top = tops.get(node)! + (span - below) / 2;
    for (const child of node.children) {
      tops.set(child, top);
      top += spans.get(child)! + gap;
    }
  }
  const wires = nodes.flatMap((node): Item[] => {
    if (!node.parent) return [];
    const [x1, y1] = [
      node.parent.x + node.parent.width,
      node.parent.y + node.parent.height / 2,
    ];
    const [x2, y2] = [node.x, node.y + node.height / 2];
    const bend = (x2 - x1) / 2;
    const path = `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
    return [{ kind: "wire", key: node.key, path, mark: node.mark }];
  });
  const right = most(nodes.map((n) => n.x + n.width));
  return {
    items: [...wires, ...nodes.map(nodeBox)],
    width: right + 1,
    height: Math.max(0, high - gap) + 2,
  };
}

/** One node under the other, children indented: fits on a phone. */
function down(nodes: Placed[]): Scene {
  let y = 1;
  const walk = (node: Placed): void => {
    node.x = node.depth * INDENT + 1;
    node.y = y;
    y += node.height + 8;
    node.children.forEach(walk);
  };
  nodes.filter((n) => !n.parent).forEach(walk);
  const wires = nodes.flatMap((node): Item[] => {
    if (!node.parent) return [];
    const [x1, y1] = [node.parent.x + 9, node.parent.y + node.parent.height];
    const [x2, y2] = [node.x, node.y + node.height / 2];
    const path = `M${x1} ${y1}C${x1} ${y2} ${x1} ${y2} ${x2} ${y2}`;
    return [{ kind: "wire", key: node.key, path, mark: node.mark }];
  });
  const right = most(nodes.map((n) => n.x + n.width));
  return {
    items: [...wires, ...nodes.map(nodeBox)],
    width: right + 1,
    height: y - 6,
  };
}

function nodeBox({ key, mark, lines, notes, width, height, x, y }: Placed): Box {
  return { kind: "box", key, mark, lines, notes, width, height, x, y };
}

// -- ring ---------------------------------------------------------------------

type Point = [number, number];

function rings(pictures: Ring[], width: number, words: Words): Scene[] {
  const rows = pictures.flatMap((p) => p.nodes);
  const count = most(pictures.map((p) => p.nodes.length));
  const arrows = pictures.flatMap((p) => p.arrows);
  const chip = words.widest(arrows.map(([, , text = ""]) => text), true) + 14;
  const texts = rows.flatMap(([, cells]) => cells.map((c) => cell(c).text));
  const wide = Math.min(130, Math.max(30, words.widest(texts) + 14));
  const longest = most(rows.map(([, cells]) => cells.length));
  const between = chip + 20;
  // cells in one line where two nodes fit side by side, else in several
  let perLine = Math.max(1, longest);
  const boxWide = (): number =>
    Math.max(
      perLine * (wide + GAP) - GAP,
      words.widest(rows.map(([name]) => name)),
    ) + 16;
  while (perLine > 1 && 2 * boxWide() + between > width) perLine -= 1;
  perLine = Math.ceil(longest / Math.ceil(longest / perLine)) || 1;
  const w = boxWide();
  const h = 26 + Math.ceil(longest / perLine) * (26 + GAP) + 5;
  const centres = circle(count, w, h, width, between) ?? loop(count, w, h, width, between);
  const left = Math.min(...centres.map(([x]) => x)) - w / 2 - 1;
  const top = Math.min(...centres.map(([, y]) => y)) - h / 2 - 1;
  const right = most(centres.map(([x]) => x)) + w / 2 + 1;
  const bottom = most(centres.map(([, y]) => y)) + h / 2 + 1;
  const shift = Math.max(0, (width - (right - left)) / 2) - left;
  for (const centre of centres) {
    centre[0] += shift;
    centre[1] -= top;
  }

  return pictures.map((picture) => {
    const items: Item[] = [];
    picture.nodes.forEach(([name, cells], n) => {
      const [cx, cy] = centres[n]!;
      const [x, y] = [cx - w / 2, cy - h / 2];
      items.push(
        {
          kind: "box",
          key: `node ${n}`,
          look: "group",
          mark: "",
          lines: [],
          x,
          y,
          width: w,
          height: h,
        },
        {
          kind: "label",
          key: `node ${n}`,
          x: cx,
          y: y + 15,
          anchor: "middle",
          lines: [name],
          strong: true,
        },
      );
      cells.forEach((data, c) => {
        const { text, mark, key } = cell(data);
        items.push(
          box(words, text, mark, {
            key: key || `${n} ${c}`,
            x: x + 8 + (c % perLine) * (wide + GAP),
            y: y + 26 + Math.floor(c / perLine) * (26 + GAP),
            width: wide,
            height: 26,
          }),
        );
      });
    });
    const pairs = new Set(picture.arrows.map(([s = 0, t = 0]) => `${s} ${t}`));
    picture.arrows.forEach(([source = 0, target = 0, text = "", mark = "on"], i) => {
      const from = centres[source]!;
      const to = centres[target]!;
      const length = Math.hypot(to[0] - from[0], to[1] - from[1]) || 1;
      const [ux, uy]: Point = [
        (to[0] - from[0]) / length,
        (to[1] - from[1]) / length,
      ];
      // two that go opposite ways keep apart
      const side = pairs.has(`${target} ${source}`) ? 15 : 0;
      const [ox, oy]: Point = [-uy * side, ux * side];
      const reach = Math.min(
        ux ? (w / 2 + 5) / Math.abs(ux) : Infinity,
        uy ? (h / 2 + 5) / Math.abs(uy) : Infinity,
      );
      const a: Point = [from[0] + ux * reach + ox, from[1] + uy * reach + oy];
      const b: Point = [to[0] - ux * reach + ox, to[1] - uy * reach + oy];
      const barb = (turn: number): string =>
        `${b[0] - 8 * ux - turn * 5 * uy} ${b[1] - 8 * uy + turn * 5 * ux}`;
      const key = `${source} ${target} ${i}`;
      items.push({
        kind: "wire",
        key,
        look: "arrow",
        mark,
        path: `M${a.join(" ")}L${b.join(" ")}M${barb(1)}L${b.join(" ")}L${barb(-1)}`,
      });
      if (!text) return;
      const wideChip = words.measure(text, true) + 14;
      items.push({
        kind: "box",
        key,
        look: "chip",
        mark,
        lines: [text],
        width: wideChip,
        height: 22,
        x: (a[0] + b[0]) / 2 - wideChip / 2,
        y: (a[1] + b[1]) / 2 - 11,
        from: [from[0] - wideChip / 2, from[1] - 11],
      });
    });
    return { items, width: right - left, height: bottom - top };
  });
}

/** Centres on an ellipse as flat as the nodes allow; null if it gets high. */
function circle(
  count: number,
  w: number,
  h: number,
  width: number,
  between: number,
): Point[] | null {
  const rx = Math.min((width - w) / 2, 150 + 26 * count);
  for (let ry = h / 2; rx > 0 && ry <= 260; ry += 6) {
    const centres = Array.from({ length: count }, (_, i): Point => {
      const angle = (2 * Math.PI * i) / count - Math.PI / 2 - Math.PI / count;
      return [rx * Math.cos(angle), ry * Math.sin(angle)];
    });
    const apart = centres.every((a, i) =>
      centres.every((b, j) => {
        const near = j === i + 1 || (i === 0 && j === count - 1);
        return (
          j <= i ||
          Math.abs(a[0] - b[0]) >= w + (near ? between : 12) ||
          Math.abs(a[1] - b[1]) >= h + (near ? 64 : 12)
        );
      }),
    );
    if (apart) return centres;
  }
  return null;
}

/** Two columns: the first to the right, down, and back up on the left. */
function loop(
  count: number,
  w: number,
  h: number,
  width: number,
  between: number,
): Point[] {
  const lines = Math.ceil(count / 2);
  const x = Math.max(w + between, Math.min(width - w, 400)) / 2;
  const y = h + 64;
  return Array.from({ length: count }, (_, i): Point => {
    if (i === 0) return [-x, 0];
    return i <= lines ? [x, (i - 1) * y] : [-x, (2 * lines - i) * y];
  });
}
