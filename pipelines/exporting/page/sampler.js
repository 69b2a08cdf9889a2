/**
 * Sampling of codes and images with a run's graphs, like sampler.py: the same uniforms, filters and draws, in float64.
 * Independent of the page and of onnxruntime: the caller passes sessions and the class of tensors.
 */
import { blake2b } from "./vendor/noble-hashes/blake2.js";

/**
 * Largest batch, and largest number of bytes of its keys and values, which every step takes and returns.
 * A sample does not depend on its batch, except for float32's rounding.
 */
const BATCH = 16;
const CACHE_BYTES = 64e6;

/**
 * Run MT19937 (Matsumoto & Nishimura 1998), seeded with one word.
 * @param {number} seed - 32 bits
 * @param {number} count - number of words
 * @returns {Uint32Array} the first words
 */
export function mersenneTwister(seed, count) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  return Uint32Array.from({ length: count }, (_, number) => {
    const i = number % 624;
    const both = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
    state[i] = state[(i + 397) % 624] ^ (both >>> 1) ^ (both & 1 ? 0x9908b0df : 0);
    let word = state[i];
    word ^= word >>> 11;
    word ^= (word << 7) & 0x9d2c5680;
    word ^= (word << 15) & 0xefc60000;
    return word ^ (word >>> 18);
  });
}

/**
 * Draw the uniforms of a sample, in [0, 1), equal to those of a torch generator seeded from the seed and the sample's number.
 * @param {number} seed - an integer
 * @param {number} number - number of the sample, from 0 on
 * @param {number} length - number of codes per sample
 * @returns {Float64Array} (length,)
 */
export function uniforms(seed, number, length) {
  const digest = blake2b(new TextEncoder().encode(`(${seed}, 'sample', ${number})`), { dkLen: 8 });
  const words = new DataView(digest.buffer, digest.byteOffset);
  const derived = (words.getUint32(0, true) >>> 1) | (words.getUint32(4, true) << 31);
  const raw = mersenneTwister(derived >>> 0, 2 * length);
  return Float64Array.from({ length }, (_, i) => ((raw[2 * i] & 0x1fffff) * 2 ** 32 + raw[2 * i + 1]) * 2 ** -53);
}

/**
 * Compute probabilities from logits with temperature, top_k, top_p and min_p.
 * @param {Float64Array} logits - (K,)
 * @param {Object} settings - a recipe's `sampling`
 * @returns {Float64Array} (K,)
 */
export function warp(logits, { temperature, top_k: topK, top_p: topP, min_p: minP }) {
  const count = logits.length;
  if (temperature === 0) {
    const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
    return Float64Array.from({ length: count }, (_, code) => (code === best ? 1 : 0));
  }
  let warped = logits.map((logit) => logit / temperature);
  if (topK > 0 && topK < count) {
    const least = warped.slice().sort()[count - topK];
    warped = warped.map((logit) => (logit < least ? -Infinity : logit));
  }
  const most = warped.reduce((a, b) => Math.max(a, b));
  const probabilities = normalized(warped.map((logit) => Math.exp(logit - most)));
  if (topP < 1) {
    const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
    let before = 0;
    for (const code of order) {
      const probability = probabilities[code];
      // The tolerance keeps rounding of the sum from adding a code where p is just reached.
      if (!(before < topP - 1e-12)) probabilities[code] = 0;
      before += probability;
    }
  }
  if (minP > 0) {
    for (let code = 0; code < count; code++) if (warped[code] < most + Math.log(minP)) probabilities[code] = 0;
  }
  return normalized(probabilities);
}

function normalized(values) {
  const sum = values.reduce((a, b) => a + b);
  return values.map((value) => value / sum);
}

/**
 * Draw a code: the first one whose cumulative probability exceeds a uniform.
 * @param {Float64Array} probabilities - (K,)
 * @param {number} uniform - in [0, 1)
 * @returns {number}
 */
export function draw(probabilities, uniform) {
  let sum = 0;
  const cumulative = probabilities.map((probability) => (sum += probability));
  const code = cumulative.findIndex((total) => total > uniform * sum);
  return code < 0 ? probabilities.length - 1 : code;
}

/**
 * Compute which codes of an image to keep: in each grid those that span no painted pixel.
 * @param {Object} model - model.json
 * @param {ArrayLike<number|boolean>} painted - (H * W,) pixels to redraw
 * @returns {boolean[]} (T,), through all levels
 */
export function keptCodes(model, painted) {
  const [height, width] = model.image_shape;
  return model.grids.flatMap(([rows, columns]) => {
    const kept = new Array(rows * columns).fill(true);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        if (painted[y * width + x]) kept[Math.floor((y * rows) / height) * columns + Math.floor((x * columns) / width)] = false;
      }
    }
    return kept;
  });
}

/**
 * Compute the number of samples per batch.
 * @param {Object} model - model.json
 * @returns {number}
 */
export function batchSize({ cache }) {
  const bytes = (cache ?? [0]).reduce((a, b) => a * b) * 4 * 2 * 2; // keys and values, with and without a label
  return Math.max(1, Math.min(BATCH, Math.floor(CACHE_BYTES / bytes)));
}

/** Sampler of an exported run; it also completes, encodes and decodes. Codes are sequences (T,) through all levels, coarse to fine. */
export class Sampler {
  /**
   * @param {Object} model - model.json
   * @param {Object} sessions - onnxruntime's sessions `prior`, `decoder` and, for `encode`, `encoder`
   * @param {Function} Tensor - onnxruntime's class
   */
  constructor(model, sessions, Tensor) {
    this.model = model;
    this.sessions = sessions;
    this.Tensor = Tensor;
    this.sizes = model.grids.map(([rows, columns]) => rows * columns);
    this.levels = this.sizes.flatMap((size, level) => new Array(size).fill(level));
    this.offsets = [0];
    for (const count of model.num_codes) this.offsets.push(this.offsets.at(-1) + count);
  }

  /**
   * Draw codes; sample i of a seed is the same for any number of samples.
   * @param {Object} request
   * @param {(number|null)[]} request.labels - label per sample, in the model's numbering; null: none
   * @param {number} request.seed
   * @param {Object} request.settings - settings that replace the model's
   * @param {Int32Array} [request.known] - codes (T,) to keep at the positions that `kept` marks
   * @param {boolean[]} [request.kept] - mask (T,); the other codes are drawn, each given those before it
   * @param {function(number): Promise<void>} [step] - called after each position with the share that is done
   * @param {function(Int32Array[], number): Promise<void>} [part] - called with the codes of each batch and the number of its first sample
   * @returns {Promise<Int32Array[]>} codes, (T,) per sample
   * @throws {Error} if a probability is not finite
   */
  async sample({ labels, seed, settings, known, kept }, step = async () => {}, part = async () => {}) {
    const drawn = [];
    const batch = batchSize(this.model);
    for (let first = 0; first < labels.length; first += batch) {
      const rows = labels.slice(first, first + batch);
      const codes = await this.#batch(rows, first, seed, { ...this.model.sampling, ...settings }, known, kept, (share) =>
        step((first + share * rows.length) / labels.length),
      );
      await part(codes, first);
      drawn.push(...codes);
    }
    return drawn;
  }

  async #batch(labels, first, seed, settings, known, kept, step) {
    const batch = labels.length;
    const length = this.levels.length;
    const uniform = labels.map((_, row) => uniforms(seed, first + row, length));
    const names = this.model.label_names ?? [];
    const guides = names.length > 0 && labels[0] !== null && this.model.supports_unconditional && settings.guidance !== 1;
    // Conditional and unconditional sequences run in one batch and share every code.
    const rows = guides ? [...labels, ...labels.map(() => null)] : labels;
    const numbers = rows.map((label) => label ?? names.length);
    const codes = rows.map(() => (known ? Int32Array.from(known) : new Int32Array(length)));
    const last = kept ? kept.lastIndexOf(false) : length - 1;
    let cache = null;
    for (let position = 0; position <= last; position++) {
      if (!this.model.cache && kept?.[position]) continue;
      const level = this.levels[position];
      const [logits, next] = await this.#logits(numbers, codes, position, cache);
      cache = next;
      if (!kept?.[position]) {
        const count = this.model.num_codes[level];
        const logitsOf = (row) => {
          const start = row * this.offsets.at(-1) + this.offsets[level];
          return Float64Array.from(logits.subarray(start, start + count));
        };
        const scale = 1 + this.model.guidance_weights[position] * (settings.guidance - 1);
        for (let row = 0; row < batch; row++) {
          let rowLogits = logitsOf(row);
          if (guides) {
            const unconditional = logitsOf(batch + row);
            // In float32, like sampler.py on the graph's logits.
            rowLogits = rowLogits.map((logit, code) => Math.fround(unconditional[code] + Math.fround(Math.fround(scale) * Math.fround(logit - unconditional[code]))));
          }
          const probabilities = warp(rowLogits, settings);
          if (!Number.isFinite(probabilities[0])) throw new Error("Temperature, guidance: expected finite probabilities, found some that are not.");
          codes[row][position] = draw(probabilities, uniform[row][position]);
          if (guides) codes[batch + row][position] = codes[row][position];
        }
      }
      await step((position + 1) / (last + 1));
    }
    return codes.slice(0, batch);
  }

  /** Compute the logits (B * codes of all levels) of a position, and the keys and values for the next, if the prior has any. */
  async #logits(labels, codes, position, cache) {
    const batch = labels.length;
    const inputs = { labels: this.#integers(labels, [batch]), position: this.#integers([position], [1]) };
    const shape = this.model.cache;
    if (!shape) {
      const flat = codes.flatMap((row) => Array.from(row));
      const { logits } = await this.sessions.prior.run({ ...inputs, codes: this.#integers(flat, [batch, this.levels.length]) });
      return [logits.data, null];
    }
    const empty = () => new this.Tensor("float32", new Float32Array(batch * shape.reduce((a, b) => a * b)), [batch, ...shape]);
    const { keys, values } = cache ?? { keys: empty(), values: empty() };
    const tokens = codes.map((row) => (position ? row[position - 1] + this.offsets[this.levels[position - 1]] : 0));
    const outputs = await this.sessions.prior.run({ ...inputs, tokens: this.#integers(tokens, [batch]), keys, values });
    return [outputs.logits.data, { keys: outputs.next_keys, values: outputs.next_values }];
  }

  /**
   * Decode codes to images.
   * @param {Int32Array[]} codes - (T,) per image
   * @returns {Promise<Uint8ClampedArray[]>} (H * W * C) per image
   */
  async decode(codes) {
    const batch = codes.length;
    const inputs = {};
    let start = 0;
    this.model.grids.forEach((grid, level) => {
      const flat = codes.flatMap((row) => Array.from(row.subarray(start, start + this.sizes[level])));
      inputs[`level${level}`] = this.#integers(flat, [batch, ...grid]);
      start += this.sizes[level];
    });
    const { images } = await this.sessions.decoder.run(inputs);
    const [height, width, channels] = this.model.image_shape;
    const area = height * width;
    return codes.map((_, row) => {
      const pixels = new Uint8ClampedArray(area * channels);
      for (let channel = 0; channel < channels; channel++) {
        for (let i = 0; i < area; i++) {
          const value = Math.min(1, Math.max(-1, images.data[(row * channels + channel) * area + i]));
          // The array rounds to the nearest integer, ties to even.
          pixels[i * channels + channel] = Math.fround(Math.fround(value + 1) * 127.5);
        }
      }
      return pixels;
    });
  }

  /**
   * Encode an image to codes.
   * @param {Uint8ClampedArray} pixels - (H * W * C)
   * @returns {Promise<Int32Array>} (T,)
   */
  async encode(pixels) {
    const [height, width, channels] = this.model.image_shape;
    const image = new Float32Array(pixels.length);
    pixels.forEach((value, i) => {
      image[(i % channels) * height * width + Math.floor(i / channels)] = value / 127.5 - 1;
    });
    const outputs = await this.sessions.encoder.run({ images: new this.Tensor("float32", image, [1, channels, height, width]) });
    return Int32Array.from(this.sizes.flatMap((_, level) => Array.from(outputs[`level${level}`].data, Number)));
  }

  #integers(numbers, shape) {
    return new this.Tensor("int64", BigInt64Array.from(numbers, BigInt), shape);
  }
}
