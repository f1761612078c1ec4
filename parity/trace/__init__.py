"""Where two sides part first: module by module, there and back, and through an optimizer's step."""
