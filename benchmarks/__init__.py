"""What measures and shows the whole: the throttled origin, the demo. The product never imports it."""
