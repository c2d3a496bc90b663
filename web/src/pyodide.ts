/** The browser's own Python: one worker a page, started at first use. */

import type { Output, Runner } from "./python";
import type { Answer, Start, Task } from "./worker";

declare const PYTHON_BYTES: number; // size of the runtime, set by build.py

/** What the page says of its Python, in the element #wm-python. */
interface Settings {
  modules: string;
  pyodide: string; // "" for the one beside this script
  wheels: string[];
  seconds?: number;
}

interface Job {
  task: Task;
  output: Partial<Output>;
  done(result: string): void;
  fail(reason: Error): void;
}

const SECONDS = 60;
const jobs: Job[] = []; // the first one is at work
let worker: Worker | null = null;
let timer = 0;

function settings(): Settings {
  const said = document.getElementById("wm-python")?.textContent;
  if (!said) throw new Error("This page does not say where its Python is.");
  return JSON.parse(said) as Settings;
}

function launch(): Worker {
  const { modules, pyodide, wheels } = settings();
  const absolute = (url: string): string => new URL(url, location.href).href;
  const made = new Worker(new URL("worker.js", import.meta.url), {
    type: "module",
  });
  made.onmessage = ({ data }: MessageEvent<Answer>) => hear(data);
  made.onerror = () =>
    hear({ failed: "The worker did not start. Is this device offline?" });
  made.postMessage({
    pyodide: pyodide
      ? absolute(pyodide)
      : new URL("pyodide/", import.meta.url).href,
    modules: absolute(modules),
    wheels: wheels.map(absolute),
    complete: pyodide !== "",
  } satisfies Start);
  return made;
}

function end(): void {
  if (worker) worker.onmessage = worker.onerror = null;
  worker?.terminate();
  worker = null;
}

/** Start the first job, if it has not started. */
function next(): void {
  const job = jobs[0];
  if (!job) return;
  try {
    worker ??= launch();
    worker.postMessage(job.task);
  } catch (error) {
    finish((job) => job.fail(error as Error));
  }
}

function finish(settle: (job: Job) => void): void {
  clearTimeout(timer);
  const job = jobs.shift();
  if (job) settle(job);
  next();
}

function hear(answer: Answer): void {
  if ("failed" in answer) end();
  const job = jobs[0];
  if (!job) return;
  if ("loaded" in answer) job.output.progress?.(loading(answer.loaded));
  else if ("text" in answer) job.output.text?.(answer.text, answer.stream);
  else if ("done" in answer) finish(({ done }) => done(answer.done));
  else if ("failed" in answer)
    finish(({ fail }) => fail(new Error(`Python failed: ${answer.failed}`)));
  else {
    job.output.progress?.("");
    const seconds = settings().seconds ?? SECONDS;
    timer = window.setTimeout(() => {
      end();
      const reason = `Stopped: it took more than ${seconds} seconds.`;
      finish(({ fail }) => fail(new Error(reason)));
    }, 1000 * seconds);
  }
}

function loading(bytes: number): string {
  const mb = (n: number): string => (n / 1e6).toFixed(1);
  return bytes < PYTHON_BYTES
    ? `Python runtime: ${mb(bytes)} of ${mb(PYTHON_BYTES)} MB`
    : "Python runtime: starting";
}

function submit(
  task: Task,
  output: Partial<Output>,
): { job: Job; result: Promise<string> } {
  let job!: Job;
  const result = new Promise<string>((done, fail) => {
    job = { task, output, done, fail };
  });
  jobs.push(job);
  if (jobs.length === 1) next();
  else output.progress?.("Waiting for another run on this page");
  return { job, result };
}

function cancel(job: Job): void {
  const at = jobs.indexOf(job);
  if (at < 0) return;
  if (at === 0) {
    end();
    finish(({ fail }) => fail(new Error("Stopped.")));
  } else {
    jobs.splice(at, 1);
    job.fail(new Error("Stopped."));
  }
}

/** Runs one cell's code; all share the page's worker, one after the other. */
export function browserRunner(): Runner {
  let mine: Job | null = null;
  return {
    name: "in this browser",
    async run(code, output) {
      const { job, result } = submit({ run: code }, output);
      mine = job;
      const traceback = await result;
      if (traceback) throw new Error(traceback);
    },
    stop() {
      if (mine) cancel(mine);
    },
  };
}

/** What a Python function raised: `name` is the exception's class. */
export class PythonError extends Error {
  constructor(type: string, message: string) {
    super(message);
    this.name = type;
  }
}

/** Calls a function of a module: JSON in, JSON out.
 *
 * An array holds arguments in their order, an object holds named ones.
 */
export async function call(
  module: string,
  name: string,
  args: unknown[] | Record<string, unknown>,
  progress?: (line: string) => void,
): Promise<unknown> {
  const task: Task = { call: [module, name, JSON.stringify(args)] };
  const { result } = submit(task, progress ? { progress } : {});
  const { value, error } = JSON.parse(await result) as {
    value?: unknown;
    error?: { type: string; message: string };
  };
  if (error) throw new PythonError(error.type, error.message);
  return value;
}

/** Ends whatever Python does on this page; the next use starts it anew. */
export function stop(): void {
  end();
  for (const job of jobs.splice(0)) job.fail(new Error("Stopped."));
  clearTimeout(timer);
}
