"use strict";
// The page of `jaxpref vote` and `jaxpref blind`. What the server says of prompts, names and errors is set as text,
// never as markup. The token is the part of the address after #, which browsers do not send; each request carries it.

const at = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const RETRY_MS = 2000, WAIT_MS = 3000, PIXELS = 160;  // pictures of at most PIXELS pixels a side are enlarged sharply
let voter = localStorage.getItem("jaxpref voter") || "";
let queue = [];        // the pair that is shown, then the next one; each with .ready, a promise of its two addresses
let progress = null;
let busy = true;       // while a vote is being written, and before the first pair
let since = 0;         // when the shown pair appeared
let shown = null;      // the pair that is on the screen
let refills = 0;       // requests for pairs so far; only the last one counts, as answers may come late or out of order
const answered = new Set();  // asks whose vote is written

// ---- Server

async function ask(path, body) {
  const options = {headers: {"Authorization": `Bearer ${token}`}, cache: "no-store"};
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  for (;;) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {  // the server is away; the same request again changes nothing twice
      notice("The server does not answer. Nothing is lost; trying again …");
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      continue;
    }
    notice("");
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => ({}));
    const error = new Error(said.error || `The server answered ${answer.status}.`);
    error.status = answer.status;
    throw error;
  }
}

const json = async (path, body) => (await ask(path, body)).json();

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function view(name) {
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== name;
}

// ---- Pairs

async function picture(name, side) {
  const blob = await (await ask(`/picture/${encodeURIComponent(name)}/${side}`)).blob();
  const address = URL.createObjectURL(blob);
  const image = new Image();
  image.src = address;
  await image.decode();
  return address;
}

function load(pair) {
  pair.ready = Promise.all([picture(pair.ask, "a"), picture(pair.ask, "b")]);
  pair.ready.catch(() => { pair.failed = true; });  // `show` reports it, and `refill` loads it again
  return pair;
}

function drop(pair) {
  pair.ready.then((addresses) => addresses.forEach((address) => URL.revokeObjectURL(address)), () => {});
}

async function refill() {
  const turn = ++refills;
  const answer = await json("/api/next", {voter});
  if (turn !== refills) return;
  progress = answer.progress;
  const known = new Map(queue.map((pair) => [pair.ask, pair]));
  const kept = (pair) => known.has(pair.ask) && !known.get(pair.ask).failed ? known.get(pair.ask) : load(pair);
  queue = answer.pairs.filter((pair) => !answered.has(pair.ask)).map(kept);
  for (const [name, pair] of known) if (!queue.some((other) => other.ask === name)) drop(pair);
  tell();
}

async function show() {
  let pair, a, b;
  do {
    pair = queue[0];
    if (!pair) return rest();
    [a, b] = await pair.ready;
  } while (pair !== queue[0]);  // the queue has changed meanwhile
  at("closely").close();
  for (const [side, address] of [["a", a], ["b", b]]) {
    for (const image of [at(`picture-${side}`), at(`close-${side}`)]) {
      image.src = address;
      image.classList.toggle("pixels", Math.max(...pair[side]) <= PIXELS);
    }
    at(`choose-${side}`).classList.remove("chosen");
  }
  at("prompt").textContent = pair.caption;
  at("said").textContent = `Next pair: ${pair.caption}`;
  view("vote");
  shown = pair;
  since = performance.now();
  busy = false;
  document.body.dataset.ask = pair.ask;  // for tests
}

function tell() {
  if (!progress) return;
  const parts = [`${progress.votes} by you`, `${progress.judged} of ${progress.pairs} pairs`];
  if (progress.per_minute) parts.push(`${progress.per_minute.toFixed(1)} a minute`);
  if (progress.repeats.of) parts.push(`${progress.repeats.same} of ${progress.repeats.of} repeats the same`);
  at("progress").textContent = parts.join(" · ");
  at("bar").firstElementChild.style.width = `${100 * progress.judged / Math.max(progress.pairs, 1)}%`;
}

const RESTS = {
  done: ["That was the last pair", "You have judged all pairs that there are for you. Thank you."],
  ended: ["Voting is over", "The comparison has ended by its rule; the summary has the results."],
  drawing: ["Pictures are being drawn", "The next pair appears by itself."],
};

function rest() {
  shown = null;
  delete document.body.dataset.ask;
  const [title, text] = RESTS[progress.state] || RESTS.drawing;
  at("rest-title").textContent = title;
  at("rest-text").textContent = progress.state === "drawing" ? `${text} ${progress.drawing || ""}` : text;
  at("undo-last").hidden = progress.state === "ended" || !progress.votes;
  view("rest");
  busy = false;
  document.body.dataset.state = progress.state;  // for tests
  if (progress.state === "drawing" || progress.state === "voting") setTimeout(() => at("rest").hidden || start(), WAIT_MS);
}

async function start() {
  busy = true;
  try {
    await refill();
    await show();
  } catch (error) {
    failed(error);
  }
}

function failed(error) {
  notice(error.message);
  busy = false;
}

async function vote(choice) {
  if (busy || !shown || at("vote").hidden) return;
  const done = shown;
  busy = true;
  if (choice === "left" || choice === "right") at(choice === "left" ? "choose-a" : "choose-b").classList.add("chosen");
  try {
    const seconds = (performance.now() - since) / 1000;
    await json("/api/vote", {voter, ask: done.ask, choice, seconds});  // the next pair is shown once it is written
  } catch (error) {
    if (error.status === 409) return start();  // this pair has a vote already, such as from another window
    return failed(error);
  }
  answered.add(done.ask);
  queue = queue.filter((pair) => pair !== done);
  if (progress) progress.votes += 1;
  tell();
  try {
    if (queue.length) {
      await show();
      drop(done);
      await refill();
    } else {
      await refill();
      await show();
      drop(done);
    }
  } catch (error) {
    failed(error);
  }
}

async function undo() {
  if (busy) return;
  busy = true;
  try {
    const answer = await json("/api/undo", {voter});
    if (!answer.undone) notice("There is nothing to undo.");
    await refill();
    await show();
  } catch (error) {
    failed(error);
  }
}

// ---- Looking closely: both pictures at the same place

let zoom = 0;  // 0: as large as fits; else pixels of the screen for a pixel

function closely(side) {
  if (!shown) return;
  if (!at("closely").open) {
    zoom = 0;
    at("closely").showModal();
    at("closely").focus();
  }
  flip(side === "b");
  size();
}

function flip(second = !at("sheet").classList.contains("second")) {
  if (!at("closely").open) {
    closely("a");
    return;
  }
  at("sheet").classList.toggle("second", second);
  at("which").textContent = second ? "B" : "A";
}

function size() {
  const stage = at("stage"), sheet = at("sheet");
  const width = Math.max(shown.a[0], shown.b[0]), height = Math.max(shown.a[1], shown.b[1]);
  const fits = Math.min(stage.clientWidth / width, stage.clientHeight / height);
  const scale = fits * 2 ** zoom;
  const middle = [(stage.scrollLeft + stage.clientWidth / 2) / (sheet.offsetWidth || 1),
                  (stage.scrollTop + stage.clientHeight / 2) / (sheet.offsetHeight || 1)];
  sheet.style.width = `${width * scale}px`;
  sheet.style.height = `${height * scale}px`;
  stage.scrollLeft = middle[0] * sheet.offsetWidth - stage.clientWidth / 2;
  stage.scrollTop = middle[1] * sheet.offsetHeight - stage.clientHeight / 2;
}

function scale(steps) {
  zoom = Math.min(Math.max(zoom + steps, 0), 5);
  size();
}

// ---- Summary

const percent = (value) => `${(100 * value).toFixed(1)} %`;

function row(cells) {
  const line = document.createElement("tr");
  cells.forEach((cell, i) => {
    const made = document.createElement(i ? "td" : "th");
    if (!i) made.scope = "row";
    made.textContent = cell;
    line.append(made);
  });
  return line;
}

function results(found) {
  const box = at("results");
  box.replaceChildren();
  if (!found) return;
  const add = (kind, text) => {
    const made = document.createElement(kind);
    made.textContent = text;
    box.append(made);
    return made;
  };
  add("p", found.rule);
  if (!found.comparisons) {
    add("p", "The results are shown when voting has ended.").className = "soft";
    return;
  }
  const table = document.createElement("table");
  const head = document.createElement("thead");
  head.append(row(["model", `win rate against ${found.baseline}`, "prompts won, lost, tied", "p", "verdict"]));
  const body = document.createElement("tbody");
  for (const [name, one] of Object.entries(found.comparisons)) {
    const bounds = one.win_rate_interval ? ` [${one.win_rate_interval.map(percent).join(", ")}]` : "";
    const p = one.p_holm < 0.001 ? "< 0.001" : one.p_holm.toFixed(3);
    body.append(row([name, percent(one.win_rate) + bounds,
                     `${one.prompts_won}, ${one.prompts_lost}, ${one.prompts_tied}`, p, one.verdict]));
  }
  table.append(head, body);
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.append(table);
  box.append(scroll);
}

async function summary() {
  view("summary");
  let found;
  try {
    found = await json("/api/summary");
  } catch (error) {
    return failed(error);
  }
  results(found.comparison);
  const c = found.choices;
  const numbers = [
    ["Pairs judged", `${found.judged} of ${found.pairs}`],
    ["Agreement", found.alpha === null ? "not known yet: too few pairs that two have judged"
      : `${found.alpha.toFixed(2)} on ${found.alpha_pairs} pairs`],
    ["Left side", found.left.of ? `${percent(found.left.count / found.left.of)} of ${found.left.of} decided votes` : "no votes yet"],
    ["Ties, both bad, skipped", `${c.tie}, ${c.bad}, ${c.skip}`],
  ];
  if (found.left_out) numbers.push(["Left out", `${found.left_out} pairs, whose pictures cannot be read`]);
  at("numbers").replaceChildren(...numbers.flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
  at("voters").replaceChildren(...found.voters.map((one) => row([
    one.name, one.votes, percent(one.share), one.overlap, one.per_minute ? one.per_minute.toFixed(1) : ""])));
}

// ---- Keys and buttons

const KEYS = {ArrowLeft: "left", ArrowRight: "right", " ": "tie", x: "bad", s: "skip"};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.closest && event.target.closest("input")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const open = at("closely").open;
  if ((key === " " || key === "Enter") && event.target.closest && event.target.closest("button")) return;  // presses it
  if (at("vote").hidden && key !== "u") return;
  if (at("join").hidden === false || at("summary").hidden === false) return;
  if (key === "f") flip();
  else if (key === "z") open ? scale(1) : closely("a");
  else if (open && (key === "+" || key === "=")) scale(1);
  else if (open && key === "-") scale(-1);
  else if (key === "u") undo();
  else if (key in KEYS) vote(KEYS[key]);
  else return;
  event.preventDefault();
});

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => { button.blur(); vote(button.dataset.choice); });
}
at("choose-a").addEventListener("click", () => { at("choose-a").blur(); vote("left"); });
at("choose-b").addEventListener("click", () => { at("choose-b").blur(); vote("right"); });
for (const button of document.querySelectorAll("[data-look]")) {
  button.addEventListener("click", () => { button.blur(); closely(button.dataset.look); });
}
for (const button of document.querySelectorAll("[data-go]")) {
  button.addEventListener("click", () => button.dataset.go === "summary" ? summary() : begin());
}
at("undo").addEventListener("click", () => { at("undo").blur(); undo(); });
at("undo-last").addEventListener("click", undo);
at("flip").addEventListener("click", () => { at("flip").blur(); flip(); });
at("close-flip").addEventListener("click", () => flip());
at("stage").addEventListener("click", () => flip());
at("larger").addEventListener("click", () => scale(1));
at("smaller").addEventListener("click", () => scale(-1));
addEventListener("resize", () => at("closely").open && size());
at("other-name").addEventListener("click", () => { queue.forEach(drop); queue = []; shown = null; view("join"); at("name").focus(); });
at("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  voter = at("name").value.trim();
  if (!voter) return;
  localStorage.setItem("jaxpref voter", voter);
  begin();
});

function begin() {
  if (!voter) {
    view("join");
    at("name").focus();
    return;
  }
  at("name").value = voter;
  start();
}

if (token) begin();
else notice("Open the whole link that the command printed: it ends in # and a long word.");
