// Asks llama.cpp, through node-llama-cpp, how it reads and answers with a GGUF file.
// standard input:  {library: path of node-llama-cpp's index.js, threads, model, texts, sequences, prompt, maxNewTokens,
//                   stops}
// standard output: {tokens, rows: [[[id of the likeliest token, its probability, the next token's probability]]],
//                   answer, ended, unknownStops}
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(asked.library));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error, maxThreads: asked.threads});
const model = await llama.loadModel({modelPath: asked.model});
const tokens = asked.texts.map((text) => model.tokenize(text, false));
const longest = Math.max(...asked.sequences.map((ids) => ids.length), asked.prompt.length + asked.maxNewTokens);
const context = await model.createContext({
    contextSize: longest + 8, threads: asked.threads, flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
// A temperature of 1 and no filters: the probabilities are the model's own.
const whole = {generateNext: {probabilities: true, options: {temperature: 1, minP: 0, topK: 0, topP: 1}}};
const rows = [];
for (const ids of asked.sequences) {
    await sequence.clearHistory();
    const found = await sequence.controlledEvaluate(ids.slice(0, -1).map((id) => [id, whole]));
    rows.push(found.map(({next: {probabilities}}, place) => {
        let best = -1, most = -1;
        for (const [id, share] of probabilities) if (share > most) [best, most] = [id, share];
        return [best, most, probabilities.get(ids[place + 1]) ?? 0];
    }));
}
const answer = [];
let ended = false;
if (asked.prompt.length > 0) {
    await sequence.clearHistory();
    for await (const id of sequence.evaluate(asked.prompt, {temperature: 0, yieldEogToken: true})) {
        ended = model.isEogToken(id);
        if (ended || answer.length === asked.maxNewTokens) break;
        answer.push(id);
    }
}
const unknownStops = asked.stops.filter((id) => !model.isEogToken(id));
process.stdout.write(JSON.stringify({tokens, rows, answer, ended, unknownStops}), () => process.exit(0));
