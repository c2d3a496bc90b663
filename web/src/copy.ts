/** The Copy button of a code panel: the code alone, without its output, as the
 * reader has edited it. */

export function startCopyButton(button: HTMLButtonElement): void {
  const panel = button.closest(".wm-code");
  const code = panel?.querySelector(".highlight pre");
  if (!panel || !code || !navigator.clipboard) return; // stays hidden
  button.hidden = false;
  button.addEventListener("click", () => {
    const edited = panel.querySelector("textarea")?.value;
    navigator.clipboard.writeText(edited ?? code.textContent ?? "").then(
      () => (button.textContent = "Copied"),
      () => (button.textContent = "Copying was refused"),
    );
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
