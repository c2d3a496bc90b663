/** The Copy button of a code panel: the code alone, without its output. */

export function startCopyButton(button: HTMLButtonElement): void {
  const code = button.closest(".wm-code")?.querySelector(".highlight pre");
  if (!code || !navigator.clipboard) return; // stays hidden
  button.hidden = false;
  button.addEventListener("click", () => {
    navigator.clipboard.writeText(code.textContent ?? "").then(
      () => (button.textContent = "Copied"),
      () => (button.textContent = "Copying was refused"),
    );
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
