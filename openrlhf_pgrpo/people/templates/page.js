"use strict";
const { state: first, token, header } = JSON.parse(document.getElementById("state").textContent);
const find = (selector) => document.querySelector(selector);
const percent = (share) => `${Math.round(100 * share)} %`;
let state = first;
let busy = false;

// Texts are set as textContent, because an answer may hold anything.
function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function show() {
  const { question, answered, skipped, questions, level } = state;
  find(".asking").hidden = !question;
  find(".done").hidden = Boolean(question);
  const of = questions === null ? "" : ` of ${questions}`;
  const goal = level === null ? "" : `, enough below ${level}`;
  const unsure = `uncertainty ${state.entropy.toFixed(2)} bits per pair${goal}`;
  const passed = skipped ? ` · ${skipped} skipped` : "";
  find(".status").textContent = question ? `Question ${answered + 1}${of}${passed} · ${unsure}` : `${answered} answers${passed}`;
  const share = question ? answered / (questions ?? Infinity) : 1;
  find(".progress div").style.width = `${100 * share}%`;
  find(".progress").setAttribute("aria-valuenow", answered);
  if (questions !== null) find(".progress").setAttribute("aria-valuemax", questions);
  if (question) {
    find(".prompt").textContent = question.prompt;
    const [left, right] = document.querySelectorAll(".sides .text");
    left.textContent = question.left;
    right.textContent = question.right;
    left.scrollTop = right.scrollTop = 0;
  } else {
    find(".kept").hidden = answered === 0;
    find(".profile").textContent = state.profile;
    find(".ranking").replaceChildren(...state.ranking.flatMap(ranked));
  }
  find(".undo").disabled = answered + skipped === 0;
  find(".forecast").textContent = forecast();
  const numbers = state.coefficients.flatMap((one) => [one.low, one.high, one.usual_low, one.usual_high]);
  const low = Math.min(...numbers);
  const scale = 100 / (Math.max(...numbers) - low);
  find(".coefficients").replaceChildren(...state.coefficients.flatMap((one, i) => coefficient(one, i, low, scale)));
}

function forecast() {
  if (!state.forecast) return "You have not answered yet, so it takes you for an average user.";
  const { choice, left } = state.forecast;
  if (choice === "tie") return `Before your last answer it gave the left one a chance of ${percent(left)}.`;
  return `It gave your last answer a chance of ${percent(choice === "left" ? left : 1 - left)}.`;
}

function coefficient(one, i, low, scale) {
  const bar = element("div", "bar");
  const place = (className, from, to) => {
    const part = element("i", className);
    part.style.left = `${(from - low) * scale}%`;
    if (to !== undefined) part.style.width = `${(to - from) * scale}%`;
    bar.append(part);
  };
  place("usual", one.usual_low, one.usual_high);
  place("range", one.low, one.high);
  place("mean", one.mean);
  const interval = `${one.mean.toFixed(2)}  [${one.low.toFixed(2)}, ${one.high.toFixed(2)}]`;
  return [element("span", "", i + 1), bar, element("span", "interval", interval)];
}

function ranked({ prompt, answers }) {
  const list = document.createElement("ol");
  for (const { answer, reward, deviation } of answers) {
    const item = document.createElement("li");
    const text = element("p", "text", answer);
    text.dir = "auto";
    item.append(text, element("span", "reward", `${reward.toFixed(2)} ± ${deviation.toFixed(2)}`));
    list.append(item);
  }
  const title = element("h2", "", prompt);
  title.dir = "auto";
  return [title, list];
}

// The page changes only after the server has saved the answer.
async function send(path, body) {
  if (busy) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  find(".problem").textContent = "";
  try {
    const headers = { [header]: token, "Content-Type": "application/json" };
    const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
    const answer = await response.json();
    if (!response.ok) find(".problem").textContent = answer.detail;
    if (answer.coefficients) state = answer;
    show();
  } catch (error) {
    find(".problem").textContent = "The server does not answer. Start it again and reload; your answers are kept.";
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

const choose = (choice) => state.question && send("answer", { question: state.question.name, choice });
const undo = () => state.answered + state.skipped && send("undo", {});
const keys = { 1: "left", 2: "right", "=": "tie", b: "both bad", s: "skip", ArrowLeft: "left", ArrowRight: "right" };

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
find(".undo").addEventListener("click", undo);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in keys) choose(keys[key]);
  else if (key === "u") undo();
  else return;
  event.preventDefault();
});
show();
