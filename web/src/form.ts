/** A form that Python made of a function: `warpmap_site.forms.form_html`.
 *
 * Its state is in the address, as `?<function>.<parameter>=<value>` for what
 * differs from the defaults, so that a link brings it back.
 */

type Control = HTMLInputElement | HTMLSelectElement;

const PAUSE = 400; // ms after the last key

function controls(form: HTMLFormElement): Control[] {
  return [
    ...form.querySelectorAll<Control>(".wm-field input, .wm-field select"),
  ];
}

function get(control: Control): string {
  return control instanceof HTMLInputElement && control.type === "checkbox"
    ? String(control.checked)
    : control.value;
}

function set(control: Control, value: string): void {
  if (control instanceof HTMLInputElement && control.type === "checkbox")
    control.checked = value === "true";
  else if (control instanceof HTMLInputElement) control.value = value;
  else if ([...control.options].some((option) => option.value === value))
    control.value = value;
}

function initial(control: Control): string {
  return control.dataset["default"] ?? "";
}

/** Dotted name of the Python function. */
export function functionOf(form: HTMLFormElement): string {
  return form.dataset["function"] ?? "";
}

/** What the fields hold, by parameter. */
export function readForm(form: HTMLFormElement): Record<string, string> {
  return Object.fromEntries(controls(form).map((c) => [c.name, get(c)]));
}

function fill(form: HTMLFormElement, values: Record<string, string>): void {
  for (const control of controls(form)) {
    const value = values[control.name];
    if (value !== undefined) set(control, value);
  }
}

/** One line under the form, read out by screen readers. */
export function say(form: HTMLFormElement, line: string, failed = false): void {
  const status = form.querySelector<HTMLElement>(".wm-form-status");
  if (!status) return;
  status.textContent = line;
  status.classList.toggle("wm-form-failed", failed);
}

/** Shows a message beside the field that is at fault, or under the form. */
export function showError(
  form: HTMLFormElement,
  message: string,
  field: string | null = null,
): void {
  clearErrors(form);
  const control = controls(form).find((c) => c.name === field);
  const place = control && document.getElementById(`${control.id}-error`);
  if (!control || !place) {
    say(form, message, true);
    return;
  }
  place.textContent = message;
  place.hidden = false;
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", `${place.id} ${control.id}-help`);
  say(form, `Not computed: see ${control.name}.`, true);
}

/** Takes every message away. */
export function clearErrors(form: HTMLFormElement): void {
  for (const control of controls(form)) {
    control.removeAttribute("aria-invalid");
    control.setAttribute("aria-describedby", `${control.id}-help`);
  }
  for (const place of form.querySelectorAll<HTMLElement>(".wm-error"))
    place.hidden = true;
  say(form, "");
}

function key(form: HTMLFormElement, control: Control): string {
  return `${functionOf(form).split(".").at(-1)}.${control.name}`;
}

function restore(form: HTMLFormElement): boolean {
  const given = new URL(location.href).searchParams;
  for (const control of controls(form)) {
    const value = given.get(key(form, control));
    if (value !== null) set(control, value);
  }
  return controls(form).some((c) => get(c) !== initial(c));
}

function remember(form: HTMLFormElement): void {
  const url = new URL(location.href);
  for (const control of controls(form)) {
    if (get(control) === initial(control))
      url.searchParams.delete(key(form, control));
    else url.searchParams.set(key(form, control), get(control));
  }
  if (url.href !== location.href) history.replaceState(history.state, "", url);
}

function presetValues(option: HTMLOptionElement): Record<string, string> {
  return JSON.parse(option.dataset["values"] ?? "{}") as Record<string, string>;
}

/** Each menu names the preset that the fields hold, if they hold one. */
function nameMenus(form: HTMLFormElement): void {
  const now = readForm(form);
  for (const menu of form.querySelectorAll<HTMLSelectElement>(".wm-preset")) {
    const fits = (option: HTMLOptionElement | undefined): boolean =>
      Object.entries(option ? presetValues(option) : {}).every(
        ([name, value]) => now[name] === value,
      );
    if (menu.value && fits(menu.selectedOptions[0])) continue;
    const found = [...menu.options].find((o) => o.value && fits(o));
    menu.value = found?.value ?? "";
  }
}

function startCopyLink(button: HTMLButtonElement): void {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", () => {
    navigator.clipboard.writeText(location.href).then(
      () => (button.textContent = "Copied"),
      () => (button.textContent = "Copying was refused"),
    );
    setTimeout(() => (button.textContent = "Copy link"), 2000);
  });
}

/** Wakes a form; `changed` is called when its values are others.
 *
 * It is called at once where the address holds values other than the defaults.
 */
export function startForm(form: HTMLFormElement, changed: () => void): void {
  const fields = form.querySelector("fieldset");
  if (fields) fields.disabled = false;
  let timer = 0;
  let last = JSON.stringify(readForm(form));
  const look = (): void => {
    clearTimeout(timer);
    const now = JSON.stringify(readForm(form));
    if (now === last) return;
    last = now;
    nameMenus(form);
    remember(form);
    changed();
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = window.setTimeout(look, PAUSE);
  });
  form.addEventListener("change", ({ target }) => {
    if (target instanceof HTMLSelectElement && target.matches(".wm-preset")) {
      const option = target.selectedOptions[0];
      if (option) fill(form, presetValues(option));
    }
    look();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.target instanceof HTMLInputElement))
      return;
    last = ""; // asked for: even the same values again
    look();
  });
  form
    .querySelector(".wm-form-reset")
    ?.addEventListener("click", () => {
      for (const control of controls(form)) set(control, initial(control));
      look();
      nameMenus(form);
    });
  const link = form.querySelector<HTMLButtonElement>(".wm-form-link");
  if (link) startCopyLink(link);

  // browsers may keep a field's text over a reload: the address decides
  for (const control of controls(form)) set(control, initial(control));
  restore(form);
  nameMenus(form);
  look();
}
