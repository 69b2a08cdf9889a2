/**
 * Worker that runs the models, so that the page stays responsive. It answers a request `{id, action, ...}` with `{id, result}` or
 * `{id, error}`, after any number of `{id, progress}` and `{id, part}`. `{action: "stop"}` stops the current sampling.
 */
import * as ort from "./vendor/onnxruntime-web/ort.js";
import { Sampler, keptCodes } from "./sampler.js";

const at = (name) => new URL(name, import.meta.url);
let sampler = null;
let stopped = false;

const actions = {
  /** Load the files for sampling; progress: share of the bytes loaded. */
  async load({ model }, { progress }) {
    const names = ["vendor/onnxruntime-web/ort.wasm", "prior.onnx", "decoder.onnx"];
    const all = names.reduce((sum, name) => sum + model.bytes[name], 0);
    let loaded = 0;
    const [wasm, prior, decoder] = await Promise.all(
      names.map((name) =>
        fetched(name, (bytes) => {
          loaded += bytes;
          progress(Math.min(1, loaded / all));
        }),
      ),
    );
    ort.env.wasm.wasmBinary = wasm;
    // Several threads would need HTTP headers that most hosts do not send.
    ort.env.wasm.numThreads = 1;
    sampler = new Sampler(model, { prior: await session(prior), decoder: await session(decoder) }, ort.Tensor);
  },

  /** Draw samples; sends parts {first, codes, images} batch by batch. */
  async sample({ labels, seed, settings }, { progress, part }) {
    await drawn({ labels, seed, settings }, progress, part);
  },

  /** Draw continuations of codes (T,) of an image whose pixels `painted` (H * W) are redrawn; sends parts as `sample` does. */
  async complete({ codes, painted, labels, seed, settings }, { progress, part }) {
    await drawn({ labels, seed, settings, known: codes, kept: keptCodes(sampler.model, painted) }, progress, part);
  },

  /** Encode an image (H * W * C). Returns its codes and the image decoded from them. */
  async encode({ pixels }) {
    sampler.sessions.encoder ??= await session(await fetched("encoder.onnx", () => {}));
    const codes = await sampler.encode(pixels);
    return { codes, image: (await sampler.decode([codes]))[0] };
  },
};

async function drawn(request, progress, part) {
  stopped = false;
  await sampler.sample(
    request,
    async (share) => {
      progress(share);
      await messages();
      if (stopped) throw new Error("Stopped.");
    },
    async (codes, first) => part({ first, codes, images: await sampler.decode(codes) }),
  );
}

async function fetched(name, onBytes) {
  const answer = await fetch(at(name), { cache: "no-cache" }); // so that replaced files are fetched again
  if (!answer.ok) throw new Error(`${name}: expected a file, found none (${answer.status}).`);
  const parts = [];
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return await new Blob(parts).arrayBuffer();
    parts.push(value);
    onBytes(value.length);
  }
}

function session(bytes) {
  return ort.InferenceSession.create(new Uint8Array(bytes), { executionProviders: ["wasm"] });
}

// Wait for one turn of the event loop, in which a message to stop is received; a timer would take four milliseconds.
const { port1, port2 } = new MessageChannel();
function messages() {
  return new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}

addEventListener("message", async ({ data: { id, action, ...content } }) => {
  if (action === "stop") {
    stopped = true;
    return;
  }
  try {
    const result = await actions[action](content, {
      progress: (progress) => postMessage({ id, progress }),
      part: (part) => postMessage({ id, part }),
    });
    postMessage({ id, result });
  } catch (error) {
    postMessage({ id, error: error.message ?? String(error) });
  }
});
