"""Pure functions and small helpers; this floor knows no layer and no model."""
