// Elements by id, and new ones; and a line of facts.

export const at = id => document.getElementById(id);

export function make(kind, properties = {}, ...children) {
  const element = Object.assign(document.createElement(kind), properties);
  element.append(...children.filter(Boolean));
  return element;
}

// Lines break between the parts, not within one.
export function line(parts) {
  return parts.map(part => part.replaceAll(" ", "\u00a0")).join(" · ");
}
