/** Which topics a reader has read; kept in this browser and nowhere else. */

const KEY = "warpmap.read";

export function readTopics(): Set<string> {
  try {
    const stored: unknown = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return new Set(Array.isArray(stored) ? stored.map(String) : []);
  } catch {
    return new Set(); // storage is blocked or holds something else
  }
}

function remember(topics: Set<string>): boolean {
  try {
    localStorage.setItem(KEY, JSON.stringify([...topics]));
    return true;
  } catch {
    return false;
  }
}

export function startReadButton(button: HTMLButtonElement): void {
  const path = button.dataset["path"] ?? "";
  const draw = (): void => {
    const done = readTopics().has(path);
    button.setAttribute("aria-pressed", String(done));
    button.textContent = done ? "✓ Read" : "Mark as read";
  };
  button.addEventListener("click", () => {
    const topics = readTopics();
    if (!topics.delete(path)) topics.add(path);
    if (remember(topics)) draw();
    else button.textContent = "This browser keeps no storage for the site";
  });
  draw();
}
