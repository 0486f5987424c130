"use strict";
const root = document.documentElement;
const button = document.getElementById("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches;
}
function showTheme() {
  button.setAttribute("aria-pressed", String(isDark()));
}
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
prefersDark.addEventListener("change", showTheme);
showTheme();

const news = document.getElementById("news");
const here = location.origin + location.pathname;

function take(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("main");
  const main = document.getElementById("main");
  if (fresh === null || fresh.outerHTML === main.dataset.text) return main;
  const open = [...main.querySelectorAll("details[open]")].map((one) => one.id);
  const focused = main.contains(document.activeElement) ? document.activeElement : null;
  const at = focused === null ? -1 : reachable(main).indexOf(focused);
  fresh.dataset.text = fresh.outerHTML;
  main.replaceWith(fresh);
  for (const id of open) fresh.querySelector("#" + CSS.escape(id))?.setAttribute("open", "");
  if (at >= 0) (reachable(fresh)[at] ?? fresh).focus({ preventScroll: true });
  news.textContent = fresh.querySelector(".state").textContent;
  return fresh;
}
function reachable(main) {
  return [main, ...main.querySelectorAll("a, summary, [tabindex]")];
}
async function ask() {
  let main = document.getElementById("main");
  try {
    const reply = await fetch(here, { cache: "no-store", credentials: "same-origin" });
    if (reply.ok) main = take(await reply.text());
    else news.textContent = "The coordinator does not show this page any more.";
  } catch {
    news.textContent = "The coordinator does not answer; asking again.";
  }
  if (main.dataset.live === "yes") setTimeout(ask, 2000);
}
if (document.getElementById("main").dataset.live === "yes") setTimeout(ask, 2000);
