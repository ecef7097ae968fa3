// Runs the status page's own script on a make-believe document. argv: the page, the JSON it would fetch.
"use strict";
const fs = require("fs");
const [page, data] = process.argv.slice(2).map(path => fs.readFileSync(path, "utf8"));
class Element {
  constructor(tag) { this.tag = tag; this.style = {}; this.children = []; this.attributes = {}; this.innerHTML = ""; this.own = ""; }
  set textContent(text) { this.own = text; }
  get textContent() { return this.own + this.children.map(child => child.textContent ?? child).join(" "); }
  replaceChildren(...children) { this.children = children; }
  append(...children) { this.children.push(...children); }
  setAttribute(name, value) { this.attributes[name] = value; }
}
const elements = {};
global.document = {
  getElementById: id => {
    if (!page.includes(`id="${id}"`) && !id.endsWith("-legend")) throw new Error(`the page has no element ${id}`);
    return elements[id] ??= new Element(id);
  },
  createElement: tag => new Element(tag),
};
global.fetch = async () => ({ json: async () => JSON.parse(data) });
global.setTimeout = () => {
  const seen = {};
  for (const [id, element] of Object.entries(elements)) seen[id] = { text: element.textContent, svg: element.innerHTML };
  console.log(JSON.stringify(seen));
};
eval(/<script>([\s\S]*)<\/script>/.exec(page)[1]);
