/** The worker that holds the browser's Python; pyodide.ts talks to it.
 *
 * It loads once, then does one task after the other. Whatever blocks it blocks
 * no page: the page ends it and starts another.
 */

/** What is used of Pyodide; its own types ask for those of Node.js. */
interface Pyodide {
  unpackArchive(zip: ArrayBuffer, format: "zip", how: { extractDir: string }): void;
  runPython(code: string): unknown;
  pyimport(module: "warpmap_site.worker"): PythonModule;
  loadPackage(urls: string[]): Promise<unknown>;
  loadPackagesFromImports(code: string): Promise<unknown>;
}
interface PythonModule {
  run(code: string, send: (stream: Stream, text: string) => void): string;
  call(module: string, name: string, args: string): string;
  destroy(): void;
}
interface Entry {
  loadPyodide(options: {
    indexURL: string;
    createPyodideModule: unknown;
  }): Promise<Pyodide>;
}

type Stream = "stdout" | "stderr";

/** What the page sends: where everything is, then tasks, one at a time. */
export interface Start {
  pyodide: string; // the folder with Pyodide's files
  modules: string; // the archive of Warpmap's modules
  wheels: string[];
  complete: boolean; // the folder has wheels for what a program imports
}
export type Task =
  | { run: string }
  | { call: [module: string, name: string, args: string] };

/** What the page gets. */
export type Answer =
  | { loaded: number } // bytes so far
  | { working: true } // loading has ended, the task begins
  | { text: string; stream: Stream }
  | { done: string } // a run's traceback or "", a call's JSON
  | { failed: string }; // this worker is of no more use

const FILES = [
  "pyodide.mjs",
  "pyodide.asm.mjs",
  "pyodide.asm.wasm",
  "python_stdlib.zip",
  "pyodide-lock.json",
];
const TYPES: Record<string, string> = {
  mjs: "text/javascript",
  wasm: "application/wasm",
};

const answer = (said: Answer): void => self.postMessage(said);
const fetched = self.fetch.bind(self);
let loaded = 0;

/** A file, counted as it comes, with the type that hosts often do not know. */
async function load(url: string, broken: () => void): Promise<Response> {
  const response = await fetched(url).catch(() => {
    throw new Error(`${url} could not be reached. Is this device offline?`);
  });
  if (!response.ok || !response.body)
    throw new Error(
      `${url} is missing (${response.status}). ` +
        "Who hosts this site makes it with: python web/build.py",
    );
  const counted = new TransformStream<Uint8Array, Uint8Array>({
    transform(chunk, onward) {
      loaded += chunk.length;
      answer({ loaded });
      onward.enqueue(chunk);
    },
  });
  response.body.pipeTo(counted.writable).catch(broken);
  const type = TYPES[url.split(".").pop()!] ?? "application/octet-stream";
  return new Response(counted.readable, { headers: { "Content-Type": type } });
}

/** A module out of what was fetched, so that its bytes count too. */
async function imported<Module>(file: Promise<Response>): Promise<Module> {
  const url = URL.createObjectURL(await (await file).blob());
  return import(url).finally(() => URL.revokeObjectURL(url));
}

async function start(where: Start): Promise<Pyodide> {
  let fail!: (reason: Error) => void;
  // Pyodide waits for ever for a file that does not come
  const failure = new Promise<never>((_, reject) => (fail = reject));
  // all at once; Pyodide itself would ask for one after the other
  const files = new Map<string, Promise<Response>>();
  for (const url of [...FILES.map((n) => where.pyodide + n), where.modules]) {
    const file = load(url, () => fail(new Error(`${url} broke off.`)));
    file.catch(fail);
    files.set(url, file);
  }
  const file = (name: string): Promise<Response> =>
    files.get(where.pyodide + name)!;
  self.fetch = (url, options) =>
    files.get(String(url)) ?? fetched(url, options);

  const booted = async (): Promise<Pyodide> => {
    const entry = imported<Entry>(file("pyodide.mjs"));
    const core = imported<{ default: unknown }>(file("pyodide.asm.mjs"));
    core.catch(() => {}); // where the entry fails first, nobody awaits it
    const python = await (await entry).loadPyodide({
      indexURL: where.pyodide,
      createPyodideModule: (await core).default,
    });
    const modules = await (await files.get(where.modules)!).arrayBuffer();
    python.unpackArchive(modules, "zip", { extractDir: "/warpmap" });
    python.runPython("import sys; sys.path.insert(0, '/warpmap')");
    if (where.wheels.length) await python.loadPackage(where.wheels);
    return python;
  };
  return Promise.race([booted(), failure]).finally(() => (self.fetch = fetched));
}

async function work(python: Pyodide, task: Task): Promise<string> {
  const worker = python.pyimport("warpmap_site.worker");
  try {
    if ("call" in task) return worker.call(...task.call);
    if (complete) await python.loadPackagesFromImports(task.run);
    return worker.run(task.run, (stream, text) => answer({ text, stream }));
  } finally {
    worker.destroy();
  }
}

let starting: Promise<Pyodide>;
let complete = false;

self.onmessage = async ({ data }: MessageEvent<Start | Task>) => {
  if ("modules" in data) {
    complete = data.complete;
    starting = start(data);
    starting.catch(() => {}); // said when a task waits for it
    return;
  }
  try {
    const python = await starting;
    answer({ working: true });
    answer({ done: await work(python, data) });
  } catch (error) {
    answer({ failed: error instanceof Error ? error.message : String(error) });
  }
};
