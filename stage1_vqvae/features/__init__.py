"""Networks whose features images are compared by: in evaluation, and by terms of training."""
