/** Python for the page: what cells run on. */

/** Where a run's output goes, as it comes. */
export interface Output {
  text(chunk: string, stream: "stdout" | "stderr"): void;
  image(png: string): void; // base64
  progress(line: string): void; // "" when there is nothing to wait for
}

/** Runs snippets: the browser's own Python, or a Jupyter kernel. */
export interface Runner {
  /** As a reader chooses it: "in this browser", "on my kernel". */
  readonly name: string;
  /** Rejects with an Error whose message is the traceback, free of ANSI. */
  run(code: string, output: Output): Promise<void>;
  /** Ends the run in progress, whatever it does; that run then rejects. */
  stop(): void;
}
