// The page of `mendlm serve`: ask, try a correction on, accept it, undo it. It speaks to the server's own HTTP API and to
// nothing else, keeps a token in this tab only, and puts words of the model or of users on the screen as text, never as HTML.

const $ = (id) => document.getElementById(id);
const PAGE = 30; // edits that the journal shows at first, and adds at a time
const RECENT = 40; // edits in the picture of success against drawdown
const STEP = 34; // pixels a bar takes
const SVG = "http://www.w3.org/2000/svg";
const KINDS = { prompt: "Prompt", rephrasing: "Rephrasings", unrelated: "Neighbours", guard: "Guard prompts" };

const state = { model: null, records: [], shown: PAGE, asked: null, tried: null, fresh: null, read: false };

// Elements. Children are elements, or values that become text.

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const h = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

function say(text) {
  $("live").textContent = "";
  requestAnimationFrame(() => { $("live").textContent = text; });
}

const notice = (text, bad = false, ...actions) =>
  h("div", { class: bad ? "notice bad" : "notice", tabindex: "-1" }, h("span", { dir: "auto" }, text), ...actions);
const complain = (place, error) => place.replaceChildren(notice(error.message, true));
const button = (text, onclick, attributes = {}) => h("button", { type: "button", onclick, ...attributes }, text);
const mark = (ok) => h("span", { class: ok ? "mark" : "mark bad" }, ok ? "✓ holds" : "✗ fails");
const percent = (share) =>
  share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share > 0.0995 && share < 0.99 ? 0 : 1).replace(/\.0$/, "")} %`;
const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;
const short = (text, length = 60) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

// One action at a time on a button, which keeps the focus meanwhile.

async function busy(control, work) {
  if (control.getAttribute("aria-disabled") === "true") return;
  control.setAttribute("aria-busy", "true");
  control.setAttribute("aria-disabled", "true");
  try {
    await work();
  } finally {
    control.removeAttribute("aria-busy");
    control.removeAttribute("aria-disabled");
  }
}

// The server

class Refusal extends Error {}

async function send(path, { method = "GET", body, signal } = {}) {
  for (let wrong = false; ; wrong = true) {
    const token = sessionStorage.getItem("mendlm.token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      const newer = sessionStorage.getItem("mendlm.token");
      if (newer !== token || (await askToken(wrong || Boolean(token)))) continue; // another request may have asked meanwhile
    }
    const told = await response.json().catch(() => null);
    const message = told?.error?.message ?? `The server answers ${response.status} ${response.statusText}`.trim();
    throw new Refusal(typeof message === "string" ? message : JSON.stringify(message));
  }
}
const get = async (path, options) => (await send(path, options)).json();

let asking = null;
function askToken(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("token-dialog");
    const before = document.activeElement;
    $("token-wrong").hidden = !wrong;
    $("token").value = "";
    $("change-token").hidden = false;
    $("token-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("mendlm.token", $("token").value.trim());
      dialog.close("given");
    };
    $("token-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      asking = null;
      before?.focus?.();
      resolve(dialog.returnValue === "given");
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

async function* streamed(response) {
  // The texts of a stream of server-sent events, as they come.
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += value ?? "";
    const events = rest.split(/\r?\n\r?\n/);
    rest = done ? "" : events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "" || data === "[DONE]") continue;
      const told = JSON.parse(data);
      if (told.error) throw new Refusal(told.error.message);
      yield told.choices?.[0]?.text ?? told.choices?.[0]?.delta?.content ?? "";
    }
    if (done) return;
  }
}

async function download(path, name) {
  const response = await send(path);
  const named = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition") ?? "");
  const link = h("a", { href: URL.createObjectURL(await response.blob()), download: named?.[1] ?? name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  say(`${link.download} is saved`);
}

// Differences, by words

const words = (text) =>
  Intl.Segmenter ? [...new Intl.Segmenter(undefined, { granularity: "word" }).segment(text)].map((part) => part.segment)
    : text.split(/(\s+)/).filter(Boolean);

function differences(before, after) {
  // Which words of either side the other lacks, by the longest common subsequence.
  const [a, b] = [words(before), words(after)];
  if (a.length * b.length > 1e6) return [a.map((word) => [word, true]), b.map((word) => [word, true])];
  const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const [left, right] = [[], []];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { left.push([a[i++], false]); right.push([b[j++], false]); }
    else if (i < a.length && (j === b.length || longest[i + 1][j] >= longest[i][j + 1])) left.push([a[i++], true]);
    else right.push([b[j++], true]);
  }
  return [left, right];
}

function marked(parts, tag) {
  // The words as text, with each run of changed ones in an element: blanks between two of them belong to it, line ends do not.
  const runs = [];
  parts.forEach(([word, changed], place) => {
    const between = !word.trim() && parts[place - 1]?.[1] && parts[place + 1]?.[1];
    const shown = !word.includes("\n") && Boolean(changed || between);
    const last = runs.at(-1);
    if (last && last[1] === shown) last[0] += word;
    else runs.push([word, shown]);
  });
  return runs.flatMap(([text, shown]) => {
    const [, before, inner, after] = /^(\s*)(.*?)(\s*)$/s.exec(text);
    return shown && inner ? [before, h(tag, {}, inner), after] : text;
  });
}

const spoken = (children, text) =>
  h("div", { class: "model-words", dir: "auto" }, text.trim() ? children : h("span", { class: "nothing" }, "no text"));

// Ask

const CHOICES = { now: ["With the active edits", undefined], base: ["The base model", []] };

async function answer(which, question, place, signal) {
  const [title, edits] = CHOICES[which];
  const body = { model: state.model ?? undefined, max_tokens: question.tokens, temperature: 0, stream: true, edits };
  const [path, form] = question.chat
    ? ["v1/chat/completions", { messages: [{ role: "user", content: question.prompt }] }]
    : ["v1/completions", { prompt: question.prompt }];
  const text = document.createTextNode("");
  const said = h("div", { class: "model-words", dir: "auto" }, text);
  const card = h("article", { class: "answer", "aria-busy": "true", "aria-label": title, "data-which": which }, h("h3", {}, title), said);
  place.append(card);
  try {
    for await (const more of streamed(await send(path, { method: "POST", body: { ...body, ...form }, signal }))) text.data = (text.data + more).trimStart();
  } finally {
    card.removeAttribute("aria-busy");
    text.data = text.data.trimEnd();
    if (!text.data) said.replaceChildren(h("span", { class: "nothing" }, "no text"));
  }
  return { card, said, title, text: text.data };
}

let stopping = null;
async function ask() {
  const question = {
    prompt: $("ask-prompt").value, chat: $("ask-chat").checked, base: $("ask-base").checked, tokens: $("ask-tokens").valueAsNumber,
  };
  state.asked = question;
  const place = $("answers");
  place.replaceChildren();
  place.hidden = false;
  stopping = new AbortController();
  $("ask-stop").hidden = false;
  try {
    const answers = await Promise.all((question.base ? ["now", "base"] : ["now"]).map((which) => answer(which, question, place, stopping.signal)));
    if (answers.length === 2 && answers.every((one) => one.text)) {
      const [base, now] = differences(answers[1].text, answers[0].text);
      answers[0].said.replaceChildren(...marked(now, "ins"));
      answers[1].said.replaceChildren(...marked(base, "del"));
    }
    answers[0].card.append(h("div", { class: "row" }, button("Correct this answer", correctThis)));
    say(answers.map((one) => `${one.title}: ${one.text || "no text"}`).join(". "));
  } catch (error) {
    stopping.abort();
    place.append(error.name === "AbortError" ? notice("Stopped.") : notice(error.message, true));
    say(error.name === "AbortError" ? "Stopped" : error.message);
  } finally {
    if (document.activeElement === $("ask-stop")) $("ask-send").focus();
    $("ask-stop").hidden = true;
  }
}

function correctThis() {
  $("edit-prompt").value = state.asked.prompt;
  $("edit-chat").checked = state.asked.chat;
  outdate();
  $("edit-target").focus();
}

function answersAreOld() {
  // The edits have changed: an answer that stands on the page may no longer be the model's.
  if (!state.asked || $("answers").querySelector(".notice.old")) return;
  const again = notice("The active edits have changed since this answer.", false, button("Ask again", askAgain));
  again.classList.add("old");
  $("answers").prepend(again);
}

function askAgain() {
  $("ask-prompt").value = state.asked.prompt;
  $("ask-chat").checked = state.asked.chat;
  $("ask").scrollIntoView({ block: "start" });
  $("ask-send").focus();
  $("ask-form").requestSubmit();
}

// Correct

const lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);

function request() {
  const unrelated = lines("edit-unrelated").map((line) => {
    const at = line.lastIndexOf("=>");
    const [prompt, wanted] = at < 0 ? [line, ""] : [line.slice(0, at).trim(), line.slice(at + 2).trim()];
    return wanted ? { prompt, answer: wanted } : prompt;
  });
  return {
    prompt: $("edit-prompt").value, target: $("edit-target").value, rephrasings: lines("edit-rephrasings"), unrelated,
    chat: $("edit-chat").checked, scale: $("edit-scale").valueAsNumber, on_base: $("edit-on-base").checked,
  };
}

async function preview() {
  const wanted = request();
  $("accepted").replaceChildren();
  $("preview").setAttribute("aria-busy", "true");
  try {
    const trial = await get("v1/preview", { method: "POST", body: wanted });
    state.tried = wanted;
    showTrial(trial);
    outdate();
    $("accept-form").hidden = false;
    $("preview").querySelector(".verdict").focus();
    say($("preview").querySelector(".verdict").textContent);
  } catch (error) {
    state.tried = null;
    $("accept-form").hidden = true;
    complain($("preview"), error);
    say(error.message);
  } finally {
    $("preview").removeAttribute("aria-busy");
  }
}

function showTrial(trial) {
  const telling = trial.asked.filter((one) => !blind(one));
  const holds = telling.filter((one) => one.ok).length;
  const told = [
    `${holds} of ${telling.length} hold`,
    trial.kept === null || trial.kept === undefined ? "no neighbours or guards were asked" : `${percent(trial.kept)} of neighbours and guards kept`,
    trial.milliseconds === undefined ? null : `made in ${trial.milliseconds.toFixed(trial.milliseconds < 10 ? 1 : 0)} ms`,
  ];
  const replaced = trial.replaces.map((id) => state.records.find((record) => record.id === id) ?? { id, request: {} });
  $("preview").replaceChildren(h("div", {},
    h("div", { class: trial.passed ? "verdict" : "verdict bad", tabindex: "-1" },
      h("h3", {}, trial.passed ? "✓ The gate passes it" : "✗ The gate fails it", h("span", { class: "unseen" }, ".")),
      h("p", {}, `${told.filter(Boolean).join(" · ")}.`),
      replaced.length ? h("p", { dir: "auto" }, `It replaces ${replaced.map(named).join(", ")}.`) : null),
    asked(trial.asked),
    norms(trial.norms)));
}

function named(record) {
  return `#${record.number ?? record.id}${record.request.target === undefined ? "" : ` (${short(record.request.target.trim(), 40)})`}`;
}

function asked(all) {
  // What a gate saw, kind by kind, before and after side by side.
  const legend = h("p", { class: "hint" }, "Bars: the probability of a token of the new answer; of neighbours and guards, of the answer to keep.");
  return [legend, ...Object.entries(KINDS).map(([kind, title]) => {
    const some = all.filter((one) => one.kind === kind);
    if (!some.length) return null;
    const telling = some.filter((one) => !blind(one));
    const holds = telling.filter((one) => one.ok).length;
    return h("div", { class: "kind", role: "group", "aria-label": title },
      h("h4", {}, some.length > 1 ? `${title} · ${holds} of ${telling.length} hold` : title),
      h("ul", {}, some.map((one) => h("li", {}, question(one)))));
  })];
}

// What was to stay and was wrong before: it holds, and says nothing.
const blind = (one) => one.was_ok === false && (one.kind === "unrelated" || one.kind === "guard");

function question(one) {
  const [was, now] = [one.before.trim(), one.after.trim()];
  const [before, after] = differences(was, now);
  const of = one.wanted ? `“${one.wanted.trim()}”` : "the earlier answer";
  const keeps = one.wanted && (one.kind === "unrelated" || one.kind === "guard") ? `To keep: ${one.wanted.trim()}` : null;
  const side = (name, parts, tag, text, share) => h("div", { class: `side ${name.toLowerCase()}` },
    h("dt", {}, name),
    h("dd", {}, spoken(marked(parts, tag), text)),
    h("dd", {}, chance(share, `Probability of ${of} ${name.toLowerCase()}: ${percent(share)}`)));
  return h("article", { class: "asked", "data-kind": one.kind },
    h("header", {}, h("div", { class: "prompt", dir: "auto" }, one.prompt),
      one.ok && blind(one) ? h("span", { class: "hint" }, "was wrong already") : mark(one.ok)),
    h("dl", { class: "sides" },
      side("Before", before, "del", was, one.probability[0]),
      side("After", after, "ins", now, one.probability[1])),
    one.before === one.after || keeps ? h("small", { dir: "auto" }, [one.before === one.after && "Same answer.", keeps].filter(Boolean).join(" ")) : null);
}

function chance(share, label) {
  const bar = h("span");
  bar.style.setProperty("--share", Math.min(1, Math.max(0, share)));
  return h("div", { class: "chance", role: "img", "aria-label": label }, h("span", { class: "track" }, bar), h("span", {}, percent(share)));
}

function outdate() {
  const stale = state.tried !== null && JSON.stringify(request()) !== JSON.stringify(state.tried);
  $("preview").classList.toggle("stale", stale);
  $("outdated").hidden = !stale;
  if (stale) $("accept-send").setAttribute("aria-disabled", "true");
  else $("accept-send").removeAttribute("aria-disabled");
}

async function accept() {
  const author = $("accept-author").value.trim();
  localStorage.setItem("mendlm.author", author);
  const more = { author, reason: $("accept-reason").value.trim(), on_fail: $("accept-gate").value || null };
  try {
    const made = await get("v1/edits", { method: "POST", body: { ...state.tried, ...more } });
    state.tried = null;
    state.fresh = made.record.id;
    $("accept-form").hidden = true;
    $("accept-reason").value = "";
    $("preview").replaceChildren();
    const told = `Edit #${made.record.number} is active${made.passed === false ? ", though the gate failed it" : ""}.`;
    const seen = state.asked ? button("Ask again", askAgain) : button("Ask it", () => { state.asked = { ...made.record.request, base: false }; askAgain(); });
    $("accepted").replaceChildren(notice(told, false, seen, h("a", { href: `#edit-${made.record.id}` }, "See it in the journal")));
    $("accepted").firstChild.focus();
    say(told);
    await readJournal();
    answersAreOld();
  } catch (error) {
    complain($("accepted"), error);
    $("accepted").firstChild.focus();
    say(error.message);
  }
}

// Pictures

function norms(byLayer) {
  const layers = Object.entries(byLayer ?? {});
  if (!layers.length) return null;
  const parts = layers.map(([name]) => name.split("."));
  let shared = 0;
  while (parts.every((one) => one.length > shared + 1 && one[shared] === parts[0][shared])) shared++;
  const most = Math.max(...layers.map(([, norm]) => norm)) || 1;
  const figure = (norm) => norm.toPrecision(3);
  const rows = layers.flatMap(([, norm], place) => [
    s("text", { class: "strong", x: 0, y: place * STEP + 12 }, parts[place].slice(shared).join(".")),
    s("text", { x: "100%", y: place * STEP + 12, "text-anchor": "end" }, figure(norm)),
    s("rect", { class: "bed", x: 0, y: place * STEP + 18, width: "100%", height: 8, rx: 4 }),
    s("rect", { class: "bar", x: 0, y: place * STEP + 18, width: `${(100 * norm) / most}%`, height: 8, rx: 4 }),
  ]);
  const label = `Norm of the change by layer: ${layers.map(([name, norm]) => `${name} ${figure(norm)}`).join(", ")}`;
  return h("figure", { class: "norms" },
    h("figcaption", {}, h("strong", {}, "Which layers change, and how much"),
      `Norm of the change${shared ? `, in ${parts[0].slice(0, shared).join(".")}` : ""}`),
    s("svg", { width: "100%", height: layers.length * STEP, role: "img", "aria-label": label }, rows));
}

function measured(record) {
  // Mean probability of the wanted answer after the edit, and the share of neighbours and guards that it lost.
  const own = (record.checks.asked ?? []).filter((one) => one.kind === "prompt" || one.kind === "rephrasing");
  const success = own.length ? own.reduce((sum, one) => sum + one.probability[1], 0) / own.length : null;
  const kept = record.checks.kept ?? null;
  return { record, success, drawdown: kept === null ? null : 1 - kept };
}

function shape(state, x, y, attributes = {}) {
  if (state === "superseded") return s("rect", { class: `dot ${state}`, x: x - 5, y: y - 5, width: 10, height: 10, transform: `rotate(45 ${x} ${y})`, ...attributes });
  return s("circle", { class: `dot ${state}`, cx: x, cy: y, r: 6, ...attributes });
}

function picture() {
  const recent = state.records.slice(-RECENT).map(measured).filter((one) => one.success !== null);
  const figure = $("picture");
  figure.hidden = !recent.length;
  if (!recent.length) return;
  const open = figure.querySelector("details")?.open ?? false;
  const known = recent.filter((one) => one.drawdown !== null);
  const right = Math.min(1, Math.max(0.2, Math.ceil(10 * Math.max(0, ...known.map((one) => one.drawdown))) / 10));
  const [left, top, wide, high] = [44, 12, 280, 200];
  const x = (share) => left + (share / right) * wide;
  const y = (share) => top + (1 - share) * high;
  const across = [0, 0.5, 1].map((part) => part * right);
  const grid = [
    ...[0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
      s("line", { class: "grid", x1: left, x2: left + wide, y1: y(share), y2: y(share) }),
      s("text", { x: left - 10, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`)]),
    ...across.flatMap((share) => [
      s("line", { class: "grid", x1: x(share), x2: x(share), y1: top, y2: top + high }),
      s("text", { x: x(share), y: top + high + 20, "text-anchor": "middle" }, `${Math.round(100 * share)} %`)]),
    s("path", { class: "axis", d: `M${left} ${top}V${top + high}H${left + wide}` }),
  ];
  const groups = []; // points that lie on each other share a label
  for (const one of known) {
    const at = [x(one.drawdown), y(one.success)];
    const near = groups.find((group) => Math.hypot(group.at[0] - at[0], group.at[1] - at[1]) < 14);
    if (near) near.all.push(one); else groups.push({ at, all: [one] });
  }
  const points = groups.flatMap((group) => {
    const names = group.all.map((one) => `#${one.record.number}`).reverse();
    const text = names.length > 3 ? `${names.slice(0, 2).join(" ")} +${names.length - 2}` : names.join(" ");
    const flip = group.at[0] > left + wide * 0.7;
    return [
      ...group.all.map((one) => {
        const point = shape(one.record.state, x(one.drawdown), y(one.success));
        const link = s("a", { href: `#edit-${one.record.id}`, tabindex: "-1" }, point);
        link.append(s("title", {}, `#${one.record.number}: success ${percent(one.success)}, drawdown ${percent(one.drawdown)}`));
        return link;
      }),
      s("text", { class: "strong", x: group.at[0] + (flip ? -11 : 11), y: group.at[1] + (group.at[1] < top + 8 ? 14 : 4), "text-anchor": flip ? "end" : "start" }, text),
    ];
  });
  const legend = ["active", "undone", "superseded"].filter((one) => known.some((other) => other.record.state === one));
  const row = (one) => h("tr", {},
    h("th", { scope: "row" }, h("a", { href: `#edit-${one.record.id}` }, `#${one.record.number}`)), h("td", {}, one.record.state),
    h("td", { class: "number" }, percent(one.success)), h("td", { class: "number" }, one.drawdown === null ? "not asked" : percent(one.drawdown)));
  figure.replaceChildren(
    h("figcaption", {}, h("strong", {}, "Success against drawdown"),
      "Success: the new answer's mean probability over prompt and rephrasings, as the edit was made. Drawdown: the share of neighbours and guards that changed. The upper left is best."),
    known.length ? s("svg", { class: "scatter", viewBox: "0 0 340 262", role: "img", "aria-label": `Success against drawdown of ${count(known.length, "recent edit")}; the numbers are in the table below` },
      grid, points, s("text", { x: left + wide / 2, y: 254, "text-anchor": "middle" }, "drawdown →"),
      s("text", { x: left + 8, y: top + high - 8 }, "↑ success")) : h("p", { class: "hint" }, "No edit has neighbours or guards to lose."),
    h("ul", { class: "legend" }, legend.map((one) => h("li", {}, s("svg", { width: 16, height: 16, "aria-hidden": "true" }, shape(one, 8, 8)), one))),
    h("details", open ? { open: true } : {}, h("summary", {}, "The same as a table"),
      h("table", {}, h("thead", {}, h("tr", {}, ["Edit", "State"].map((name) => h("th", { scope: "col" }, name)),
        ["Success", "Drawdown"].map((name) => h("th", { scope: "col", class: "number" }, name)))), h("tbody", {}, recent.toReversed().map(row)))));
}

// The journal

async function readJournal() {
  try {
    const records = [];
    let told;
    do {
      told = await get(records.length ? `v1/edits?after=${encodeURIComponent(records.at(-1).id)}` : "v1/edits");
      records.push(...told.data);
    } while (told.has_more && told.data.length);
    state.records = records;
    state.read = true;
    const head = /^0*$/.test(told.head ?? "") ? null : told.head;
    $("head").replaceChildren(...(head ? ["Head of the journal: ", h("code", { title: head }, head.slice(0, 16)), "…"] : []));
    $("trouble").replaceChildren();
    showJournal();
  } catch (error) {
    $("journal-status").textContent = "The journal could not be read.";
    complain($("trouble"), error);
  }
}

function showJournal() {
  const active = state.records.filter((record) => record.state === "active").length;
  $("active").textContent = active ? count(active, "active edit") : "no active edits";
  disable($("export-all"), !active);
  const [text, wanted] = [$("filter-text").value.trim().toLowerCase(), $("filter-state").value];
  const found = state.records.toReversed().filter((record) => (!wanted || record.state === wanted)
    && [record.request.prompt, record.request.target, record.author, record.reason, record.id, `#${record.number}`].join("\n").toLowerCase().includes(text));
  const some = found.slice(0, state.shown);
  $("journal-status").textContent = !state.records.length ? "" : found.length === state.records.length ? count(found.length, "edit") : `${found.length} of ${count(state.records.length, "edit")}`;
  const held = new Map([...$("edits").children].map((item) => [item.id, item]));
  const focus = document.activeElement?.closest?.(".edit")?.id;
  const items = some.map((record) => {
    const old = held.get(`edit-${record.id}`);
    const content = JSON.stringify(record);
    return old?.content === content ? old : Object.assign(item(record, old?.querySelector("details").open), { content });
  });
  if (!state.records.length) items.push(h("li", { class: "empty" }, "No edits yet. What you accept above is listed here, and can be undone."));
  else if (!items.length) items.push(h("li", { class: "empty" }, "No edit fits this search."));
  $("edits").replaceChildren(...items);
  for (const one of items) one.classList.toggle("fresh", one.id === `edit-${state.fresh}`);
  if (focus && !document.activeElement?.closest?.(".edit")) $(focus)?.querySelector("[data-turn]")?.focus();
  $("more").hidden = found.length <= state.shown;
  picture();
}

function disable(control, off) {
  if (off) control.setAttribute("aria-disabled", "true");
  else control.removeAttribute("aria-disabled");
}

function item(record, open = false) {
  const { request: told } = record;
  const other = (id) => { const found = state.records.find((one) => one.id === id); return h("a", { href: `#edit-${id}` }, found ? `#${found.number}` : id); };
  const turn = record.state === "undone" ? ["Redo", "POST", "/redo"] : ["Undo", "DELETE", ""];
  const trouble = h("div", { role: "alert" });
  const path = `v1/edits/${encodeURIComponent(record.id)}`;
  const details = h("details", { ontoggle: () => { if (details.open && details.children.length === 1) details.append(inside(record)); } }, h("summary", {}, "Details", h("span", { class: "unseen" }, ` of edit #${record.number}`)));
  const node = h("li", { class: record.state === "active" ? "edit" : "edit off", id: `edit-${record.id}`, "data-state": record.state, tabindex: "-1" },
    h("header", {},
      h("strong", {}, `#${record.number}`),
      h("span", { class: `badge ${record.state}` }, record.state),
      record.superseded_by ? h("span", {}, "by ", other(record.superseded_by)) : null,
      record.supersedes.length ? h("span", {}, "replaces ", record.supersedes.flatMap((id, place) => (place ? [", ", other(id)] : [other(id)]))) : null,
      record.checks.passed === false ? h("span", { class: "mark bad" }, "✗ failed the gate") : null,
      h("time", { datetime: record.time }, when(record.time)),
      record.author ? h("span", {}, "by ", h("bdi", {}, record.author)) : null),
    told.prompt === undefined ? h("p", { class: "given" }, "Not made from words here: an edit that was brought in.")
      : h("p", { class: "what", dir: "auto" }, h("span", {}, told.prompt), h("span", { class: "arrow" }, h("span", { "aria-hidden": "true" }, "→"), h("span", { class: "unseen" }, " becomes ")), h("b", {}, h("bdi", {}, (told.target ?? "").trim()))),
    record.reason ? h("p", { class: "reason", dir: "auto" }, record.reason) : null,
    h("div", { class: "row" },
      button(turn[0], ({ currentTarget }) => busy(currentTarget, async () => {
        trouble.replaceChildren();
        try {
          await send(`${path}${turn[2]}?author=${encodeURIComponent($("accept-author").value.trim())}`, { method: turn[1] });
          await readJournal();
          answersAreOld();
          say(`Edit #${record.number} is ${turn[0] === "Undo" ? "undone" : "active again"}`);
        } catch (error) { complain(trouble, error); }
      }), { "data-turn": turn[0].toLowerCase(), "aria-label": `${turn[0]} edit #${record.number}` }),
      button("Adapter", ({ currentTarget }) => busy(currentTarget, async () => {
        trouble.replaceChildren();
        try { await download(`${path}/adapter`, `${record.id}.zip`); } catch (error) { complain(trouble, error); }
      }), { "aria-label": `Download edit #${record.number} as an adapter` }),
      told.prompt === undefined ? null : button("Use as a template", () => { template(told); }, { class: "quiet", "aria-label": `Use edit #${record.number} as a template` })),
    trouble, details);
  details.open = open;
  return node;
}

function when(time) {
  const date = new Date(time);
  return Number.isNaN(date.valueOf()) ? String(time) : date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function inside(record) {
  const { request: told, checks } = record;
  const number = (id) => { const found = state.records.find((one) => one.id === id); return found ? `#${found.number}` : id; };
  const facts = {
    Form: told.prompt === undefined ? null : told.chat ? "chat turn" : "raw text",
    Strength: told.scale,
    "Made under": record.stack.length ? record.stack.map(number).join(", ") : "no other edits",
    Id: record.id, Editor: [record.editor.source, record.editor.step && `step ${record.editor.step}`].filter(Boolean).join(", "),
    Base: record.base.name ?? record.base.sha256, "Brought in from": record.imported?.id, File: record.file, Size: record.size === undefined ? null : `${record.size.toLocaleString()} bytes`,
  };
  return h("div", { class: "inside" },
    norms(checks.norms),
    checks.asked?.length ? asked(checks.asked) : h("p", { class: "hint" }, "No gate has asked about this edit."),
    h("dl", { class: "pairs" }, Object.entries(facts).filter(([, value]) => value !== null && value !== undefined && value !== "")
      .flatMap(([name, value]) => [h("dt", {}, name), h("dd", { dir: "auto" }, String(value))])));
}

function template(told) {
  $("edit-prompt").value = told.prompt;
  $("edit-target").value = (told.target ?? "").trim();
  $("edit-rephrasings").value = (told.rephrasings ?? []).join("\n");
  $("edit-unrelated").value = (told.unrelated ?? []).map((one) => (one.answer ? `${one.prompt} => ${one.answer.trim()}` : one.prompt ?? one)).join("\n");
  $("edit-chat").checked = Boolean(told.chat);
  $("edit-scale").value = told.scale ?? 1;
  outdate();
  $("correct").scrollIntoView({ block: "start" });
  $("edit-target").focus();
}

function goTo(id) {
  // An edit that the search or the length of the list hides is shown first.
  if (!$(`edit-${id}`)) {
    $("filter-text").value = $("filter-state").value = "";
    state.shown = Math.max(state.shown, state.records.length - state.records.findIndex((record) => record.id === id));
    showJournal();
  }
  $(`edit-${id}`)?.scrollIntoView({ block: "center" });
  $(`edit-${id}`)?.focus();
}

// What the controls do

const submits = (form, control, work) => $(form).addEventListener("submit", (event) => {
  event.preventDefault();
  busy($(control), work);
});
submits("ask-form", "ask-send", ask);
submits("edit-form", "edit-preview", preview);
submits("accept-form", "accept-send", () => accept().finally(() => setTimeout(outdate)));
$("edit-form").addEventListener("input", outdate);
$("ask-stop").addEventListener("click", () => stopping?.abort());
$("refresh").addEventListener("click", ({ currentTarget }) => busy(currentTarget, readJournal));
$("export-all").addEventListener("click", ({ currentTarget }) => busy(currentTarget, async () => {
  try { await download("v1/adapter", "adapter.zip"); } catch (error) { complain($("trouble"), error); }
}));
$("more").addEventListener("click", () => { state.shown += PAGE; showJournal(); });
for (const id of ["filter-text", "filter-state"]) $(id).addEventListener("input", () => { state.shown = PAGE; showJournal(); });
$("change-token").addEventListener("click", async () => { if (await askToken(false)) start(); });
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href^='#edit-']");
  if (!link) return;
  event.preventDefault();
  state.fresh = link.getAttribute("href").slice("#edit-".length);
  showJournal();
  goTo(state.fresh);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && state.read) readJournal(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form) {
    event.preventDefault();
    event.target.form.requestSubmit();
  }
});

async function start() {
  $("accept-author").value = localStorage.getItem("mendlm.author") ?? "";
  const models = get("v1/models").then(
    (told) => { state.model = told.data[0]?.id ?? null; $("model").textContent = state.model ?? "no model"; },
    () => { $("model").textContent = "no model"; });
  await Promise.all([models, readJournal()]);
}
start();
