"""The simulator's room: LIBERO's tasks as pure episodes, in processes of their own. Imports no other room."""
