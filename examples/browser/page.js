// The page. models.json, which build.py writes, lists the models of each tab and their files.
import { env, pipeline } from "@huggingface/transformers";

const TYPING_PAUSE = 150; // milliseconds without a key before a sentence is classified
const root = new URL("./", import.meta.url);
const { runtime, tabs } = await (await fetch("models.json")).json();
const $ = (selector, element = document) => element.querySelector(selector);
const create = (tag, properties) => Object.assign(document.createElement(tag), properties);

// ---- downloads: every byte is counted as it arrives -----------------------------------------

const arrived = { ...runtime.code }; // path -> bytes; the code is here before this line runs
const models = Object.values(tabs).flatMap((tab) => tab.models);
const views = [];

async function countedFetch(url, options) {
  const path = new URL(url, root).href.slice(root.href.length);
  const model = models.find(({ folder }) => path.startsWith(`${folder}/`));
  if (model && !(path in model.files)) {
    return new Response(null, { status: 404 }); // an optional file that it does not have
  }
  const response = await fetch(url, options);
  let bytes = 0; // of this request; small files are requested more than once
  const count = new TransformStream({
    transform(chunk, controller) {
      bytes += chunk.length;
      arrived[path] = Math.max(bytes, arrived[path] ?? 0);
      views.forEach((view) => view());
      controller.enqueue(chunk);
    },
  });
  return new Response(response.body.pipeThrough(count), response);
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 1)} MB`;
const total = (files) => Object.values(files).reduce((sum, bytes) => sum + bytes, 0);

/** Show the bytes of some files that have arrived, now and whenever it changes. */
function follow(element, files) {
  const view = () => {
    const bytes = Object.keys(files).reduce((sum, path) => sum + (arrived[path] ?? 0), 0);
    $("progress", element).value = bytes / total(files);
    $(".bytes", element).textContent = `${megabytes(bytes)} of ${megabytes(total(files))} downloaded`;
    element.dataset.bytes = bytes;
  };
  views.push(view);
  view();
}

// ---- models: everything comes from this host ------------------------------------------------

const { wasm } = env.backends.onnx;
Object.assign(env, { fetch: countedFetch, useBrowserCache: false });
Object.assign(env, { allowLocalModels: true, localModelPath: root.pathname, allowRemoteModels: false });
// One thread: more need headers that many hosts do not send. No path: the default is a CDN.
Object.assign(wasm, { numThreads: 1, wasmPaths: {} });
const kept = {};

/** Return the promise that a function returns; it is called again only if that one was rejected. */
function once(name, make) {
  return (kept[name] ??= make().catch((error) => {
    delete kept[name];
    throw error;
  }));
}

async function downloadRuntime() {
  const [path] = Object.keys(runtime.wasm);
  const response = await countedFetch(path);
  if (!response.ok) throw new Error(`${path}: status ${response.status}`);
  return response.arrayBuffer();
}

/** Return the promise of a pipeline; the model and the runtime are downloaded once. */
export async function load(task, { folder }) {
  wasm.wasmBinary = await once("runtime", downloadRuntime);
  return once(folder, () => pipeline(task, folder, { device: "wasm" }));
}

// ---- cards: one model each ------------------------------------------------------------------

function row({ label, score }) {
  const item = create("li", { textContent: label });
  item.append(create("span", { textContent: `${(100 * score).toFixed(1)} %` }));
  item.append(create("meter", { value: score, ariaHidden: true }));
  return item;
}

let queue = Promise.resolve();
/** Run after everything that was passed before, so that no time includes that of another model. */
const inTurn = (task) => (queue = queue.then(task));

/** Add the card of a model; return a function that classifies the input and shows the answer. */
function addCard(panel, tab, model, current) {
  const card = $("#model").content.firstElementChild.cloneNode(true);
  const button = $("button", card);
  const options = { top_k: tab.top };
  let classify, answered, hasRun;
  card.dataset.folder = model.folder;
  $("h2", card).textContent = model.name;
  $("progress", card).ariaLabel = `Download of ${model.name}`;
  follow(card, model.files);
  $(".models", panel).append(card);

  function show(items, time = "") {
    $("ol", card).replaceChildren(...items);
    $(".time", card).textContent = time;
  }
  function failed({ message }) {
    answered = undefined; // so that the same input is tried again
    show([create("li", { textContent: `Failed: ${message}` })]);
  }

  async function answer() {
    const input = current();
    if (!classify || input === answered) return;
    if (input) {
      if (!hasRun) await classify(input, options); // the first run also prepares the model
      hasRun = true;
      const begun = performance.now();
      const scores = await classify(input, options);
      const time = performance.now() - begun;
      show(scores.map(row), `${time.toFixed(time < 10 ? 1 : 0)} ms`);
    } else {
      show([]);
    }
    answered = input;
  }
  const answerInTurn = () => inTurn(() => answer().catch(failed));

  button.textContent = `Download ${model.name}`;
  button.onclick = async () => {
    button.hidden = true;
    try {
      classify = await load(tab.task, model);
    } catch (error) {
      failed(error);
      button.hidden = false; // to try again
      return;
    }
    await answerInTurn();
  };
  return answerInTurn;
}

// ---- tabs: an input and its cards -----------------------------------------------------------

function addText(panel, tab) {
  const field = $("textarea", panel);
  let timer;
  field.value = tab.example;
  field.oninput = () => {
    clearTimeout(timer);
    timer = setTimeout(panel.answer, TYPING_PAUSE);
  };
  return () => field.value.trim();
}

function addImage(panel, tab) {
  const picture = $("#picture");
  const area = $(".picture");
  const show = (source) => {
    picture.src = source;
    panel.answer?.();
  };
  const take = (file) => file?.type.startsWith("image/") && show(URL.createObjectURL(file));
  $("#file").onchange = (event) => take(event.target.files[0]);
  area.ondragover = (event) => {
    event.preventDefault();
    area.classList.add("over");
  };
  area.ondragleave = () => area.classList.remove("over");
  area.ondrop = (event) => {
    event.preventDefault();
    area.classList.remove("over");
    take(event.dataTransfer.files[0]);
  };
  for (const sample of tab.samples) {
    const button = create("button", { type: "button", onclick: () => show(sample) });
    button.append(create("img", { src: sample, alt: sample.replace(/^.*\/|\..*$/g, "") }));
    $("#samples").append(button);
  }
  if (tab.samples.length) show(tab.samples[0]);
  return () => picture.getAttribute("src") && picture.src;
}

const inputs = { text: addText, image: addImage };
const names = Object.keys(tabs);

function select(name) {
  for (const other of names) {
    const isSelected = other === name;
    Object.assign($(`#tab-${other}`), { ariaSelected: isSelected, tabIndex: isSelected ? 0 : -1 });
    $(`#${other}`).hidden = !isSelected;
  }
  // The compressed model comes first and starts at once; float32 waits for a click.
  const start = $(`#${name} .models button`);
  if (!start.hidden) start.click();
}

for (const name of names) {
  const panel = $(`#${name}`);
  const current = inputs[name](panel, tabs[name]);
  const answers = tabs[name].models.map((model) => addCard(panel, tabs[name], model, current));
  panel.answer = () => answers.forEach((answer) => answer());
  const tab = create("button", { id: `tab-${name}`, role: "tab", type: "button", textContent: tabs[name].title });
  tab.setAttribute("aria-controls", name);
  tab.onclick = () => select(name);
  $("[role=tablist]").append(tab);
}
$("[role=tablist]").onkeydown = ({ key }) => {
  if (key !== "ArrowLeft" && key !== "ArrowRight") return;
  const other = names[(names.indexOf(document.activeElement.id.slice(4)) + 1) % names.length];
  $(`#tab-${other}`).focus();
  select(other);
};
follow($("footer"), { ...runtime.code, ...runtime.wasm });
select(names[0]);
