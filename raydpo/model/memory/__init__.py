"""The ledger of a training's memory, part by part, from which plans and the budget of a micro-batch are made."""
