/** The home page's map: what comes before and after a topic, filters, paths.
 *
 * The page already holds every topic as a list of links; this only marks,
 * hides and connects them.
 */

import { readTopics } from "./read";

interface Topic {
  path: string;
  title: string;
  area: string;
  before: string[];
}

type Atlas = Record<string, Topic>; // in reading order

const SVG = "http://www.w3.org/2000/svg";

function ancestors(atlas: Atlas, path: string): Set<string> {
  const found = new Set<string>();
  const todo = [...(atlas[path]?.before ?? [])];
  for (let next = todo.pop(); next; next = todo.pop()) {
    if (found.has(next)) continue;
    found.add(next);
    todo.push(...(atlas[next]?.before ?? []));
  }
  return found;
}

function successors(atlas: Atlas, path: string): Set<string> {
  const all = Object.entries(atlas);
  return new Set(all.filter(([, t]) => t.before.includes(path)).map(([p]) => p));
}

/** A polyline's path data, its corners rounded. */
function rounded(points: [number, number][], radius: number): string {
  let path = `M${points[0]!.join(" ")}`;
  for (let i = 1; i < points.length - 1; i += 1) {
    const [[ax, ay], [x, y], [bx, by]] = [
      points[i - 1]!,
      points[i]!,
      points[i + 1]!,
    ];
    const before = Math.hypot(ax - x, ay - y);
    const after = Math.hypot(bx - x, by - y);
    const r = Math.min(radius, before / 2, after / 2);
    const along = (tx: number, ty: number, length: number): string =>
      length ? `${x + ((tx - x) * r) / length} ${y + ((ty - y) * r) / length}` : `${x} ${y}`;
    path += `L${along(ax, ay, before)}Q${x} ${y} ${along(bx, by, after)}`;
  }
  return `${path}L${points.at(-1)!.join(" ")}`;
}

function count(n: number, noun: string): string {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

export function startMap(map: HTMLElement): void {
  const data = document.getElementById("wm-atlas")?.textContent ?? "[]";
  const topics = JSON.parse(data) as Topic[];
  const atlas: Atlas = Object.fromEntries(topics.map((t) => [t.path, t]));
  const items = new Map<string, HTMLElement>();
  for (const item of map.querySelectorAll<HTMLElement>("li[data-path]"))
    items.set(item.dataset["path"] ?? "", item);
  const wires = map.querySelector<SVGElement>(".wm-wires")!;
  const status = document.getElementById("wm-status")!;
  const panel = document.getElementById("wm-path")!;
  const form = document.querySelector<HTMLFormElement>(".wm-filters")!;
  const goal = document.getElementById("wm-goal") as HTMLInputElement;
  const counted = document.getElementById("wm-count") as HTMLOutputElement;
  let pinned = ""; // the topic whose path is shown

  const read = readTopics();
  for (const [path, item] of items)
    item.classList.toggle("wm-read-topic", read.has(path));

  // -- what comes before and after --------------------------------------------

  /** A line from one topic to another, along gutters and band borders. */
  function wire(from: string, to: string, kind: string): void {
    const [a, b] = [items.get(from), items.get(to)];
    if (!a?.offsetParent || !b?.offsetParent) return;
    const origin = map.getBoundingClientRect();
    const [p, q] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
    const lane = (wires.childElementCount % 3) * 3; // parallel lines part
    const [x1, x2] = [p, q].map((r) => r.left - origin.left - 7 - lane) as [
      number,
      number,
    ];
    const [y1, y2] = [p, q].map((r) => r.top + 11 - origin.top) as [
      number,
      number,
    ];
    const lower = (y1 > y2 ? a : b).closest(".wm-band")!;
    const border = lower.getBoundingClientRect().top - origin.top + 6 + lane;
    const corners: [number, number][] = [
      [x1 + 7 + lane, y1],
      [x1, y1],
      ...(Math.abs(x1 - x2) < 2
        ? []
        : ([
            [x1, border],
            [x2, border],
          ] as [number, number][])),
      [x2, y2],
      [x2 + 7 + lane, y2],
    ];
    const line = document.createElementNS(SVG, "path");
    line.setAttribute("d", rounded(corners, 6));
    line.setAttribute("class", kind);
    line.style.stroke = `var(--wm-${atlas[from]!.area})`;
    wires.append(line);
  }

  function show(path: string): void {
    const before = ancestors(atlas, path);
    const after = successors(atlas, path);
    map.classList.add("wm-dim");
    for (const [p, item] of items) {
      item.classList.toggle("on", before.has(p) || after.has(p));
      item.classList.toggle("me", p === path);
    }
    wires.replaceChildren();
    for (const to of [...before, path])
      for (const from of atlas[to]!.before)
        wire(from, to, to === path ? "near" : "");
    for (const to of after) wire(path, to, "near after");
    status.textContent =
      `${atlas[path]!.title}: ${count(before.size, "topic")} before it, ` +
      `leads to ${after.size}`;
    status.hidden = false;
  }

  function clear(): void {
    if (pinned) return show(pinned);
    map.classList.remove("wm-dim");
    for (const item of items.values()) item.classList.remove("on", "me");
    wires.replaceChildren();
    status.hidden = true;
  }

  const at = (event: Event): string =>
    (event.target as Element).closest<HTMLElement>("li[data-path]")?.dataset[
      "path"
    ] ?? "";
  map.addEventListener("pointerover", (event) => {
    const path = at(event);
    if (path) show(path);
  });
  map.addEventListener("focusin", (event) => {
    const path = at(event);
    if (path) show(path);
  });
  map.addEventListener("pointerleave", clear);
  map.addEventListener("focusout", clear);
  window.addEventListener("resize", clear);

  // -- everything before a topic, in order ------------------------------------

  function showPath(path: string): void {
    const before = ancestors(atlas, path);
    const order = Object.keys(atlas).filter((p) => before.has(p) || p === path);
    const unread = order.filter((p) => p !== path && !readTopics().has(p));
    const title = document.createElement("h2");
    title.textContent =
      `Before ${atlas[path]!.title}: ${count(before.size, "topic")}, ` +
      `${unread.length} unread`;
    const list = document.createElement("ol");
    for (const p of order) {
      const link = document.createElement("a");
      link.href = items.get(p)!.querySelector("a")!.href;
      link.dataset["area"] = atlas[p]!.area;
      link.textContent = atlas[p]!.title + (readTopics().has(p) ? " ✓" : "");
      const item = document.createElement("li");
      item.append(link);
      list.append(item);
    }
    const close = document.createElement("button");
    close.type = "button";
    close.textContent = "Close the path";
    close.addEventListener("click", closePath);
    panel.replaceChildren(title, list, close);
    panel.hidden = false;
    pinned = path;
    show(path);
  }

  function closePath(): void {
    pinned = "";
    panel.hidden = true;
    goal.value = "";
    if (location.hash) history.replaceState(null, "", location.pathname);
    clear();
  }

  function follow(): void {
    const path = location.hash.replace(/^#path=/, "");
    if (atlas[path]) showPath(path);
    else if (pinned) closePath();
  }

  goal.addEventListener("change", () => {
    const named = goal.value.trim().toLowerCase();
    const found = Object.entries(atlas).find(
      ([, t]) => t.title.toLowerCase() === named,
    );
    goal.setCustomValidity(!named || found ? "" : "No topic has this title");
    goal.reportValidity();
    if (found) location.hash = `path=${found[0]}`;
    else if (!named) closePath();
  });
  window.addEventListener("hashchange", follow);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && pinned) closePath();
  });

  // -- filters ----------------------------------------------------------------

  function filter(): void {
    const chosen = new FormData(form);
    const wants = (name: string): string[] => chosen.getAll(name).map(String);
    const [areas, runs, kinds] = [wants("area"), wants("runs"), wants("kind")];
    const unread = chosen.has("unread");
    const known = readTopics();
    let left = 0;
    for (const [path, item] of items) {
      const { kind = "", runs: places = "" } = item.dataset;
      item.hidden =
        (areas.length > 0 && !areas.includes(atlas[path]!.area)) ||
        (kinds.length > 0 && !kinds.includes(kind)) ||
        (runs.length > 0 && !runs.some((r) => places.split(" ").includes(r))) ||
        (unread && known.has(path));
      if (!item.hidden) left += 1;
    }
    for (const part of map.querySelectorAll<HTMLElement>("section"))
      part.hidden = !part.querySelector("li[data-path]:not([hidden])");
    counted.textContent = left < items.size ? count(left, "topic") : "";
    clear();
  }

  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.querySelector("button")!.addEventListener("click", () => {
    form.reset();
    closePath();
    filter();
  });
  filter();
  follow();
}
