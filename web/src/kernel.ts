/** The reader's own kernel: one panel a page, and a place for cells to run. */

import { offerRunner, withdrawRunner } from "./cell";
import {
  ask,
  keepConnection,
  LOCAL,
  parseAddress,
  readConnection,
  type Answer,
  type Connection,
} from "./connection";
import type { Kernel } from "./jupyter";
import type { Runner } from "./python";

let connection: Connection | null = null;
let opened: Promise<Kernel> | null = null;

/** The tab's kernel, started or found again at the first use. */
async function open(): Promise<Kernel> {
  const there = connection;
  if (!there) throw new Error("No kernel is connected.");
  if (opened && (await opened).disposed) opened = null;
  opened ??= import("./jupyter").then(({ Kernel }) => Kernel.open(there));
  return opened.catch((error: unknown) => {
    opened = null;
    throw error;
  });
}

interface Report {
  about(says: string): void;
  lost(answer: Answer): void;
}

/** The kernel as a place where cells run. */
function kernelRunner(report: Report, wrap = (code: string) => code): Runner {
  let running: Kernel | null = null;
  let stopped = false;
  return {
    name: "on my kernel",
    async run(code, output) {
      stopped = false;
      output.progress("Starting the kernel");
      try {
        running = await open();
        output.progress("");
        if (stopped) throw new Error("Stopped.");
        await running.run(wrap(code), output);
      } catch (error) {
        const answer = connection ? await ask(connection) : "fine";
        if (answer === "fine") throw error;
        report.lost(answer);
        throw new Error("The Jupyter server does not answer; see below.");
      } finally {
        running = null;
      }
      void open().then((kernel) => kernel.about()).then(report.about, () => {});
    },
    stop() {
      stopped = true;
      running?.stop();
    },
  };
}

/** A program for several processes, which the kernel starts. */
const severally = (code: string): string =>
  `from warpmap_site.launching import run_ranks\nrun_ranks(${JSON.stringify(code)})`;

// -- the panel ------------------------------------------------------------------

type Child = Node | string;

function make<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  properties: Partial<HTMLElementTagNameMap[Name]>,
  ...children: Child[]
): HTMLElementTagNameMap[Name] {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const code = (text: string): HTMLElement => make("code", {}, text);

/** Why no kernel can be reached, most likely first. */
function checklist({ url }: Connection, answer: Answer): HTMLElement {
  const silent = answer === "silent";
  const says = silent
    ? `Nothing answers at ${url}, or the browser does not let this page ask.`
    : `The server at ${url} refuses this page or this token.`;
  const checks: Child[][] = [
    ["Does ", code("warpmap serve"), " still run? Each start has another token, and mostly another port."],
    ["Is the address complete, up to the last letter of the token?"],
    [
      `The server must allow the origin of this page, ${location.origin}. `,
      code("warpmap serve"),
      " allows its own site and no other.",
    ],
  ];
  if (location.protocol === "https:")
    checks.push([
      "This page comes over https: the browser asks whether it may reach your " +
        "local network. Was that allowed?",
    ]);
  else if (!LOCAL)
    checks.push([
      "This page comes over plain http from elsewhere: browsers let it reach " +
        "no server on this machine.",
    ]);
  return make(
    "div",
    { className: "wm-kernel-why" },
    make("p", {}, says),
    make("ul", {}, ...checks.map((check) => make("li", {}, ...check))),
    make("p", {}, "Nothing was run."),
  );
}

/** Puts the panel under the page's first cell. */
export async function startKernelPanel(cell: HTMLElement): Promise<void> {
  const state = make("span", { className: "wm-kernel-state" });
  const why = make("div", { role: "alert" });
  const body = make("div", { className: "wm-kernel-body" });
  const panel = make(
    "details",
    { className: "wm-kernel" },
    make("summary", {}, "Your kernel: ", state),
    body,
  );
  cell.after(panel);

  let runners: Runner[] = [];
  const about = (says: string): void => {
    if (connection && says) state.textContent = says;
  };
  const lost = (answer: Answer): void => {
    if (!connection) return;
    const list = checklist(connection, answer);
    forget();
    disconnected();
    why.replaceChildren(list);
    panel.open = true;
  };

  function forget(): void {
    runners.forEach(withdrawRunner);
    runners = [];
    connection = opened = null;
    keepConnection(null);
  }

  async function connect(wanted: Connection): Promise<void> {
    state.textContent = "asking";
    const answer = await ask(wanted);
    connection = wanted;
    if (answer !== "fine") return lost(answer);
    keepConnection(wanted);
    const report = { about, lost };
    const one = kernelRunner(report);
    const several = kernelRunner(report, severally);
    runners = [one, several];
    offerRunner(one, several);
    connected();
  }

  function connected(): void {
    state.textContent = connection?.about ?? "connected";
    const restart = make("button", { type: "button" }, "Restart");
    const leave = make("button", { type: "button" }, "Disconnect");
    const act = async (button: HTMLElement, doing: string, work: (kernel: Kernel) => Promise<void>): Promise<void> => {
      const says = state.textContent;
      state.textContent = doing;
      try {
        await work(await open());
        state.textContent = says;
        button.focus();
      } catch {
        if (connection) lost(await ask(connection));
      }
    };
    restart.addEventListener("click", () => void act(restart, "restarting", (kernel) => kernel.restart()));
    leave.addEventListener("click", async () => {
      if (connection?.kernel) await act(leave, "ending", (kernel) => kernel.end());
      forget();
      disconnected();
    });
    why.replaceChildren();
    body.replaceChildren(
      make("p", {}, `Cells run at ${connection?.url}, with your rights there.`),
      make("p", {}, restart, leave),
    );
  }

  function disconnected(): void {
    state.textContent = "not connected";
    const address = make("input", { type: "text", placeholder: "http://127.0.0.1:8888/", required: true });
    const token = make("input", { type: "text", placeholder: "if not in the address" });
    for (const field of [address, token]) {
      field.autocomplete = "off";
      field.spellcheck = false;
    }
    const form = make(
      "form",
      {},
      make("label", {}, "Address", address),
      make("label", {}, "Token", token),
      make("button", {}, "Connect"),
    );
    address.addEventListener("input", () => address.setCustomValidity(""));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const wanted = parseAddress(address.value, token.value);
      if (wanted) return void connect(wanted);
      address.setCustomValidity("An address with http://, and a token");
      address.reportValidity();
    });
    const how: Child[] = LOCAL
      ? ["Cells run on your machine and its GPU after ", code("warpmap serve"), ": open the address that it prints, or paste it here."]
      : [
          "Cells run on your machine and its GPU in the site that ",
          code("warpmap serve"),
          " shows you from a clone. From this site a browser may refuse it: " +
            "Copy and Notebook take the code to your own Jupyter.",
        ];
    body.replaceChildren(
      make("p", {}, ...how),
      form,
      make("p", {}, "What runs there has your rights on that machine."),
      why,
    );
  }

  disconnected();
  const kept = readConnection();
  if (kept) await connect(kept);
}
