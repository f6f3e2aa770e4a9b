// Elements by id, and new ones.

export const at = id => document.getElementById(id);

export function make(kind, properties = {}, ...children) {
  const element = Object.assign(document.createElement(kind), properties);
  element.append(...children.filter(Boolean));
  return element;
}
