"use strict";
// The web chat. Text of models becomes text nodes only; control characters in it are shown as their escapes.
(() => {
  const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]/gu;
  const $ = (id) => document.getElementById(id);
  const log = $("log"), question = $("question"), send = $("send");
  let key = "";
  let turns = [];
  let running = null; // the AbortController of the answers that are arriving
  let kept = 0;

  function shown(text) {
    return text.replace(CONTROLS, (found) => {
      const code = found.charCodeAt(0);
      return code === 13 ? "\\r" : code < 256 ? "\\x" + code.toString(16).padStart(2, "0") : "\\u" + code.toString(16).padStart(4, "0");
    });
  }

  function make(tag, name, text = "") {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = shown(text);
    return made;
  }

  function button(name, text, action) {
    const made = make("button", name, text);
    made.type = "button";
    made.addEventListener("click", action);
    return made;
  }

  function say(text) { $("status").textContent = shown(text); }

  // ---- the server

  async function call(path, body, signal) {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
    }
    if (response.ok) return response;
    let told = `the server answered with status ${response.status}`;
    try { told = (await response.json()).error.message; } catch { /* no JSON: the status has to do */ }
    if (response.status === 401) {
      askForKey();
      told = "the server asks for a key";
    }
    throw new Error(told);
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    try {
      for (let held = ""; ;) {
        const { done, value } = await reader.read();
        if (done) throw new Error("the connection ended in the middle of the answer");
        const parts = (held + value).split("\n\n");
        held = parts.pop();
        for (const part of parts) {
          const data = part.replace(/^data: /, "");
          if (data === "[DONE]") return;
          const event = JSON.parse(data);
          if (event.error) throw new Error(event.error.message);
          yield event;
        }
      }
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  function askForKey() {
    $("why").textContent = key ? "The server does not know this key." : "This server asks for a key.";
    key = "";
    if (!$("ask").open) $("ask").showModal();
  }

  async function begin() {
    let models;
    try {
      models = (await (await call("/v1/models")).json()).data;
    } catch (error) {
      say(error.message);
      return;
    }
    $("ask").close();
    const names = models.map((model) => model.id);
    for (const [id, given] of [["first", names], ["second", ["", ...names]]]) {
      $(id).replaceChildren(...given.map((name) => {
        const made = make("option", "", name || "nothing");
        made.value = name;
        return made;
      }));
    }
    $("second").value = names[1] || "";
    $("tokens").max = Math.max(...models.map((model) => model.max_model_len - 1));
    $("tokens").value = Math.min($("tokens").value, $("tokens").max);
    chosen();
    say("");
    question.focus();
  }

  function chosen() {
    const [first, second] = [$("first").value, $("second").value];
    $("about").textContent = shown(second ? `${first} beside ${second}` : first);
    $("hiding").hidden = !second;
  }

  // ---- the conversation

  // What a turn is asked after: the turns before it that have an answer. Of two answers, the one that was preferred, or
  // else the first.
  function conversation(turn) {
    const system = $("system").value;
    const messages = system.trim() ? [{ role: "system", content: system }] : [];
    for (const before of turns.slice(0, turns.indexOf(turn))) {
      const said = (before.answers[before.preferred ?? 0] || { text: "" }).text;
      if (said.trim()) messages.push({ role: "user", content: before.asked }, { role: "assistant", content: said });
    }
    return [...messages, { role: "user", content: turn.asked }];
  }

  function ask() {
    const asked = question.value;
    if (running || !asked.trim() || !ready()) return;
    const turn = { asked, answers: [], preferred: null, node: make("div", "turn") };
    const mine = make("div", "text mine", asked);
    mine.dir = "auto";
    mine.prepend(make("span", "hidden", "You: "));
    turn.node.append(mine, make("div", "answers"));
    turns.push(turn);
    log.append(turn.node);
    question.value = "";
    answer(turn);
  }

  function ready() {
    const wrong = ["temperature", "tokens"].map($).find((field) => !field.checkValidity());
    if (!$("first").value) begin();
    if (wrong) {
      $("settings").open = true;
      wrong.reportValidity();
    }
    return !wrong && $("first").value !== "";
  }

  async function answer(turn) {
    const names = [$("first").value, $("second").value].filter(Boolean);
    const hidden = names.length > 1 && $("blind").checked;
    if (hidden && Math.random() < 0.5) names.reverse();
    turn.preferred = null;
    turn.messages = conversation(turn);
    turn.answers = names.map((model, i) => column(model, hidden ? `Answer ${i + 1}` : model));
    turn.node.querySelector(".answers").replaceChildren(...turn.answers.map((one) => one.node));
    document.querySelectorAll(".again, .prefer").forEach((old) => old.remove()); // only the last turn can be changed
    log.scrollTop = log.scrollHeight;
    running = new AbortController();
    send.textContent = "Stop";
    log.setAttribute("aria-busy", "true"); // a screen reader reads the answers once they are whole
    say(names.length > 1 ? "Two answers are arriving" : "An answer is arriving");
    await Promise.all(turn.answers.map((one) => receive(one, turn.messages, running.signal)));
    const stopped = running.signal.aborted;
    running = null;
    send.textContent = "Send";
    log.setAttribute("aria-busy", "false");
    if (!turns.includes(turn)) return; // a new chat has begun
    turn.node.append(button("again", "Regenerate", () => { if (!running && ready()) answer(turn); }));
    const failed = turn.answers.some((one) => one.failed);
    say(stopped ? "Stopped" : failed ? "There is no whole answer" : offer(turn) || "Done");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 200) log.scrollTop = log.scrollHeight;
  }

  function column(model, title) {
    const node = make("article", "answer"), head = make("h3", "", title), text = make("div", "text"), note = make("p", "note");
    text.dir = "auto";
    note.hidden = true;
    node.append(head, text, note);
    return { model, title, text: "", end: "", failed: false, node, head, into: text, note };
  }

  async function receive(one, messages, signal) {
    const body = {
      model: one.model, messages, stream: true,
      temperature: $("temperature").valueAsNumber, max_tokens: $("tokens").valueAsNumber,
    };
    one.node.setAttribute("aria-busy", "true");
    try {
      for await (const event of events(await call("/v1/chat/completions", body, signal))) {
        const choice = event.choices[0];
        const text = choice.delta.content || "";
        const following = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
        one.text += text;
        one.into.append(shown(text));
        one.end = choice.finish_reason || one.end;
        if (following) log.scrollTop = log.scrollHeight;
      }
      if (one.end === "length") remark(one, "cut off at max tokens");
      else if (!one.text.trim()) remark(one, "an empty answer");
    } catch (error) {
      one.end = "";
      one.failed = error.name !== "AbortError";
      remark(one, one.failed ? error.message : "stopped");
    }
    one.node.setAttribute("aria-busy", "false");
  }

  function remark(one, text) {
    one.note.classList.toggle("bad", one.failed);
    one.note.textContent = shown(text);
    one.note.hidden = false;
  }

  // ---- preferences

  function offer(turn) {
    if (turn.answers.length < 2 || turn.answers.some((one) => !one.end || !one.text.trim())) return "";
    if (turn.answers[0].text.trim() === turn.answers[1].text.trim()) return "Both answers are the same";
    turn.answers.forEach((one, i) => {
      one.button = button("prefer", "Prefer this answer", () => prefer(turn, i));
      one.button.setAttribute("aria-label", shown(`Prefer this answer: ${one.title}`));
      one.node.append(one.button);
    });
    return "Which answer is better? The conversation goes on with the one that you prefer, or with the first";
  }

  async function prefer(turn, index) {
    const pair = turn.answers, better = pair[index], worse = pair[1 - index];
    for (const one of pair) one.button.disabled = true;
    turn.preferred = index;
    try {
      await call("/ui/preferences", {
        messages: turn.messages, chosen: better.text, rejected: worse.text, chosen_model: better.model, rejected_model: worse.model,
      });
    } catch (error) {
      for (const one of pair) one.button.disabled = false;
      say(`The preference was not kept: ${error.message}`);
      return;
    }
    kept += 1;
    for (const one of pair) {
      one.button.remove();
      one.head.textContent = shown(one === better ? `${one.model}, preferred` : one.model);
    }
    better.node.classList.add("preferred");
    say(`Preference kept (${kept} in this chat)`);
    question.focus();
  }

  // ---- controls

  function stop() { if (running) running.abort(); }

  send.addEventListener("click", () => { if (running) stop(); else ask(); question.focus(); });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !event.isComposing) stop(); });
  $("fresh").addEventListener("click", () => {
    stop();
    turns = [];
    kept = 0;
    log.replaceChildren();
    say("");
    question.focus();
  });
  for (const id of ["first", "second"]) $(id).addEventListener("change", chosen);
  $("unlock").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value.trim();
    $("key").value = "";
    if (/^[\x20-\x7e]+$/.test(key)) begin();
    else askForKey();
  });
  const wide = matchMedia("(min-width: 720px)");
  const arrange = () => { $("settings").open = wide.matches; };
  wide.addEventListener("change", arrange);
  arrange();
  begin();
})();
