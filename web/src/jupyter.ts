/** Code on a Jupyter kernel: text, errors and PNG come back, never HTML. */

import { KernelAPI, KernelConnection, ServerConnection } from "@jupyterlab/services";
import type { KernelMessage } from "@jupyterlab/services";
import { ask, keepConnection, type Connection } from "./connection";
import type { Output } from "./python";

const PATIENCE = 5000; // milliseconds; what ignores an interrupt is restarted

// each run begins with nothing defined and prints what `python FILE` prints
const PREPARE = `
get_ipython().reset(new_session=False)
get_ipython().ast_node_interactivity = "none"
get_ipython().run_line_magic("xmode", "Plain")
`;
const ABOUT = `
def about():
    import platform
    try:
        import torch
        names = [
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count())
        ]
    except Exception:  # torch is missing or broken
        names = []
    gpus = f"{len(names)} x {names[0]}" if names[1:] else "".join(names)
    return f"Python {platform.python_version()}, {gpus or 'no GPU'}"
`;

const plain = (text: string): string =>
  text.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "");

export class Kernel {
  private stopping = 0; // the timer of a stop in progress
  private restarted = false;

  private constructor(
    private readonly connection: Connection,
    private readonly kernel: KernelConnection,
  ) {
    let was = "";
    kernel.connectionStatusChanged.connect((_, status) => {
      if (status === "connecting" && was === "connected") void this.look();
      was = status;
    });
  }

  /** The tab's kernel, or a new one. */
  static async open(connection: Connection): Promise<Kernel> {
    const { url, token, kernel: id } = connection;
    const serverSettings = ServerConnection.makeSettings({
      baseUrl: url,
      wsUrl: url.replace(/^http/, "ws"),
      token,
      appendToken: true, // a WebSocket has no other place for it
      init: { cache: "no-store", credentials: "omit" },
    });
    let model = id && (await KernelAPI.getKernelModel(id, serverSettings));
    if (!model) {
      model = await KernelAPI.startNew({}, serverSettings);
      connection.kernel = model.id;
      delete connection.about;
      keepConnection(connection);
    }
    return new Kernel(
      connection,
      new KernelConnection({ model, serverSettings, handleComms: false }),
    );
  }

  /** Resolves when the code has ended; rejects with what Python raised. */
  async run(code: string, output: Output): Promise<void> {
    const quiet = { silent: true, store_history: false, allow_stdin: false };
    // both go out at once; what is asked first is done first
    void this.kernel.requestExecute({ code: PREPARE, ...quiet }).done.catch(() => {});
    const future = this.kernel.requestExecute({
      code,
      store_history: false,
      allow_stdin: false,
    });
    future.onIOPub = (message) => show(message, output);
    this.restarted = false;
    const { content } = await future.done.catch(() => {
      clearTimeout(this.stopping);
      this.stopping = 0;
      throw new Error(
        this.restarted
          ? "Stopped: the kernel was restarted."
          : "The kernel ended. Was it out of memory?",
      );
    });
    const stopped = this.stopping > 0;
    clearTimeout(this.stopping);
    this.stopping = 0;
    if (content.status === "ok") return; // perhaps just before the stop
    if (stopped || !("traceback" in content)) throw new Error("Stopped.");
    throw new Error(plain(content.traceback.join("\n")));
  }

  /** Interrupts; restarts what goes on nevertheless. */
  stop(): void {
    if (this.stopping) return;
    this.stopping = window.setTimeout(() => void this.restart(), PATIENCE);
    this.kernel.interrupt().catch(() => {});
  }

  async restart(): Promise<void> {
    this.restarted = true;
    await this.kernel.restart();
  }

  /** Ends the kernel itself. */
  async end(): Promise<void> {
    await this.kernel.shutdown();
    this.kernel.dispose();
  }

  get disposed(): boolean {
    return this.kernel.isDisposed;
  }

  /** Which Python and GPU; asked once a kernel, after its first run. */
  async about(): Promise<string> {
    this.connection.about ??= await this.askAbout();
    keepConnection(this.connection);
    return this.connection.about;
  }

  private async askAbout(): Promise<string> {
    const { content } = await this.kernel.requestExecute({
      code: ABOUT,
      silent: true,
      store_history: false,
      user_expressions: { about: "about()" },
    }).done;
    if (content.status !== "ok") return "";
    const said = content.user_expressions["about"] as
      | { data?: Record<string, string> }
      | undefined;
    return (said?.data?.["text/plain"] ?? "").replace(/^['"]|['"]$/g, "");
  }

  /** The connection broke: gives up where the server is gone. */
  private async look(): Promise<void> {
    if ((await ask(this.connection)) !== "fine") this.kernel.dispose();
  }
}

function show({ content, ...message }: KernelMessage.IIOPubMessage, output: Output): void {
  const type = message.header.msg_type;
  if (type === "stream") {
    const { name, text } = content as KernelMessage.IStreamMsg["content"];
    output.text(plain(text), name);
  } else if (type === "display_data") {
    const { data } = content as KernelMessage.IDisplayDataMsg["content"];
    const png = data["image/png"];
    const text = data["text/plain"];
    if (typeof png === "string") output.image(png.replace(/\s/g, ""));
    else if (typeof text === "string") output.text(`${plain(text)}\n`, "stdout");
  }
}
