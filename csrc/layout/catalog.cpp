#include "layout/catalog.h"
