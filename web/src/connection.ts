/** Where a reader's Jupyter server is; kept for this tab and nowhere else. */

export interface Connection {
  url: string; // ends in "/"
  token: string;
  kernel?: string; // its id, once one runs
  about?: string; // "Python 3.12.3, NVIDIA H200"
}

export type Answer = "fine" | "refused" | "silent";

const KEY = "warpmap.kernel";
export const LOCAL = ["127.0.0.1", "localhost"].includes(location.hostname);

export function readConnection(): Connection | null {
  try {
    return JSON.parse(sessionStorage.getItem(KEY) ?? "null") as Connection | null;
  } catch {
    return null; // storage is blocked or holds something else
  }
}

export function keepConnection(connection: Connection | null): void {
  try {
    if (connection) sessionStorage.setItem(KEY, JSON.stringify(connection));
    else sessionStorage.removeItem(KEY);
  } catch {
    // the next page asks again
  }
}

/** A connection out of what `warpmap serve` or Jupyter print, or null. */
export function parseAddress(address: string, token = ""): Connection | null {
  let url: URL;
  try {
    url = new URL(address.trim());
  } catch {
    return null;
  }
  if (!["http:", "https:"].includes(url.protocol)) return null;
  const said = new URLSearchParams(url.hash.slice(1) || url.search);
  const found = token.trim() || said.get("token");
  if (!found) return null;
  const port = said.get("kernel");
  if (port) return { url: `http://127.0.0.1:${Number(port)}/`, token: found };
  const folder = url.pathname.replace(/(\/(lab|tree|login))?\/*$/, "");
  return { url: `${url.origin}${folder}/`, token: found };
}

/** Takes `#kernel=...&token=...` out of the address; says if it was there. */
export function takeAddress(): boolean {
  if (!location.hash.startsWith("#kernel=")) return false;
  const found = LOCAL ? parseAddress(location.href) : null; // else not ours
  history.replaceState(null, "", location.pathname + location.search);
  if (found) keepConnection(found);
  return found !== null;
}

/** Asks the server; a browser does not say why it got no answer. */
export async function ask({ url, token }: Connection): Promise<Answer> {
  const options: RequestInit = {
    cache: "no-store",
    credentials: "omit",
    signal: AbortSignal.timeout(5000),
  };
  try {
    const headers = { Authorization: `token ${token}` };
    const answer = await fetch(`${url}api/kernels`, { ...options, headers });
    return answer.ok ? "fine" : "refused";
  } catch {
    return fetch(`${url}api`, { ...options, mode: "no-cors" }).then(
      () => "refused", // something is there
      () => "silent",
    );
  }
}
