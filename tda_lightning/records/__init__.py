"""Plain data that the stages of the library hand to each other."""
