/**
 * What computes, beside the page, so that it stays responsive. Asked by messages `{id, action, ...}`, answers `{id, result}` or
 * `{id, error}`, and before that any number of `{id, progress}` and `{id, part}`. `{action: "stop"}` ends what is being drawn.
 */
import * as ort from "./vendor/onnxruntime-web/ort.js";
import { Sampler, keptCodes } from "./sampler.js";

const at = (name) => new URL(name, import.meta.url);
let sampler = null;
let stopped = false;

const actions = {
  /** Load all that drawing needs; progress: the share of its bytes that are here. */
  async load({ model }, { progress }) {
    const names = ["vendor/onnxruntime-web/ort.wasm", "prior.onnx", "decoder.onnx"];
    const all = names.reduce((sum, name) => sum + model.bytes[name], 0);
    let here = 0;
    const [wasm, prior, decoder] = await Promise.all(
      names.map((name) =>
        fetched(name, (bytes) => {
          here += bytes;
          progress(Math.min(1, here / all));
        }),
      ),
    );
    ort.env.wasm.wasmBinary = wasm;
    // Several threads would need headers of the host, which most do not send.
    ort.env.wasm.numThreads = 1;
    sampler = new Sampler(model, { prior: await session(prior), decoder: await session(decoder) }, ort.Tensor);
  },

  /** Samples: parts {first, codes, images} as they come. */
  async sample({ labels, seed, settings }, { progress, part }) {
    await drawn({ labels, seed, settings }, progress, part);
  },

  /** Draw continuations of codes (T,) of an image whose pixels `painted` (H * W) are redrawn; sends parts as `sample` does. */
  async complete({ codes, painted, labels, seed, settings }, { progress, part }) {
    await drawn({ labels, seed, settings, given: codes, kept: keptCodes(sampler.model, painted) }, progress, part);
  },

  /** The codes of an image (H * W * C), and the image that they decode to. */
  async encode({ pixels }) {
    sampler.sessions.encoder ??= await session(await fetched("encoder.onnx", () => {}));
    const codes = await sampler.encode(pixels);
    return { codes, image: (await sampler.decode([codes]))[0] };
  },
};

async function drawn(asked, progress, part) {
  stopped = false;
  await sampler.sample(
    asked,
    async (share) => {
      progress(share);
      await messages();
      if (stopped) throw new Error("Stopped.");
    },
    async (codes, first) => part({ first, codes, images: await sampler.decode(codes) }),
  );
}

async function fetched(name, more) {
  const answer = await fetch(at(name), { cache: "no-cache" }); // what was replaced on the host is replaced here
  if (!answer.ok) throw new Error(`${name}: expected a file, found none (${answer.status}).`);
  const parts = [];
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return await new Blob(parts).arrayBuffer();
    parts.push(value);
    more(value.length);
  }
}

function session(bytes) {
  return ort.InferenceSession.create(new Uint8Array(bytes), { executionProviders: ["wasm"] });
}

// A turn of the event loop, in which a message to stop is heard; timers would wait four milliseconds each.
const { port1, port2 } = new MessageChannel();
function messages() {
  return new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}

addEventListener("message", async ({ data: { id, action, ...asked } }) => {
  if (action === "stop") {
    stopped = true;
    return;
  }
  try {
    const result = await actions[action](asked, {
      progress: (progress) => postMessage({ id, progress }),
      part: (part) => postMessage({ id, part }),
    });
    postMessage({ id, result });
  } catch (error) {
    postMessage({ id, error: error.message ?? String(error) });
  }
});
